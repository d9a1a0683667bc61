/* What the compiled linear attention is made of: vectors, products, Hedgehog's map, rows in and out, threads.

   Tiles of T tokens are kept transposed: tokens lie along the lanes, so that both softmaxes of Hedgehog's map and the
   normaliser are sums of vectors, and no vector is summed over its lanes. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define PANEL 4 /* vectors of a row that a micro-kernel keeps in registers */
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#define PANEL 2
#else
#define LANES 4
#define PANEL 2
#endif

#define T 64
#define MOST 128     /* of D, E and the width of a softmax */
#define FLOOR 1e-12f /* hhbench.linear_sum.FLOOR */
#define SAFE 60.0f   /* half the spread of logits up to which exp(y) and exp(-y) are computed at once */
#define UP(x, to) (((x) + (to) - 1) / (to) * (to))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int ivec __attribute__((vector_size(4 * LANES), may_alias));

INLINE vec load(const float *p) {
  vec x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE void store(float *p, vec x) { memcpy(p, &x, sizeof x); }

INLINE vec all(float x) { return x - (vec){0}; }

INLINE vec masked(vec x, ivec take) { return (vec)((ivec)x & take); }

INLINE vec either(ivec take, vec a, vec b) { return (vec)(((ivec)a & take) | ((ivec)b & ~take)); }

/* b where either is NaN: it goes on if it is given second. */
#if LANES == 16
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif LANES == 8
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vec larger(vec a, vec b) { return either(a > b, a, b); }
INLINE vec smaller(vec a, vec b) { return either(a < b, a, b); }
#endif

/* Products of matrices: mr rows and nv vectors of columns at a time, sum_k a(row, k) b[k]. */

typedef struct {
  const float *a; /* a(row, k) = a[row * row_stride + k * stride] */
  long row_stride, stride;
  const float *b; /* rows of vectors */
  long b_stride, depth;
} Term;

#define RUN 32 /* products that are summed up one after another: a sum of such sums rounds less */

/* What was summed up so far is put aside, to what `kept` says is there already. */
INLINE void keep(float *aside, const int kept, vec acc[8][PANEL], const int mr, const int nv) {
  __asm__ volatile("" : : "r"(aside) : "memory"); /* in memory, or the compiler runs out of registers */
  UNROLL for (int r = 0; r < mr; r++) {
    UNROLL for (int c = 0; c < nv; c++) {
      float *to = aside + (r * PANEL + c) * LANES;
      if (kept) acc[r][c] += load(to);
      store(to, acc[r][c]);
      acc[r][c] = all(0);
    }
  }
}

/* Returns whether there is something aside. */
INLINE int accumulate(float *aside, int kept, vec acc[8][PANEL], const int mr, const int nv, const Term t) {
  const float *a = t.a, *b = t.b;
  for (long left = t.depth; left > 0; left -= RUN) {
    for (long k = MIN(left, RUN); k; k--, a += t.stride, b += t.b_stride) {
      vec row[PANEL];
      UNROLL for (int c = 0; c < nv; c++) row[c] = load(b + c * LANES);
      UNROLL for (int r = 0; r < mr; r++) {
        const vec s = all(a[r * t.row_stride]);
        UNROLL for (int c = 0; c < nv; c++) acc[r][c] += s * row[c];
      }
    }
    if (left > RUN) keep(aside, kept, acc, mr, nv), kept = 1;
  }
  return kept;
}

INLINE Term at_place(Term t, long row, long column) {
  t.a += row * t.row_stride;
  t.b += column;
  return t;
}

/* What becomes of a finished block of a product. */
typedef struct {
  float *to;
  long stride;
  int add;            /* to what is there */
  const float *scale; /* of each row, or NULL */
  long rows, columns; /* that are written, of a product that is padded */
} Into;

INLINE void finish(vec acc[8][PANEL], const int mr, const int nv, const Into o, long row, long column) {
  UNROLL for (int r = 0; r < mr; r++) {
    if (row + r >= o.rows) return;
    float *to = o.to + (row + r) * o.stride + column;
    UNROLL for (int c = 0; c < nv; c++) {
      vec x = acc[r][c];
      if (o.scale) x *= all(o.scale[row + r]);
      const long left = o.columns - column - c * LANES;
      if (left >= LANES) {
        if (o.add) x += load(to + c * LANES);
        store(to + c * LANES, x);
      } else if (left > 0) { /* only where nothing is added: what is added to is padded */
        float some[LANES];
        store(some, x);
        memcpy(to + c * LANES, some, sizeof(float) * left);
      }
    }
  }
}

INLINE void block(const int mr, const int nv, Term t, Term more, Into o, long row, long column) {
  vec acc[8][PANEL] = {{{0}}};
  float aside[8 * PANEL * LANES] __attribute__((aligned(64)));
  int kept = accumulate(aside, 0, acc, mr, nv, at_place(t, row, column));
  if (more.depth) {
    keep(aside, kept, acc, mr, nv);
    kept = accumulate(aside, 1, acc, mr, nv, at_place(more, row, column));
  }
  if (kept) {
    UNROLL for (int r = 0; r < mr; r++)
      UNROLL for (int c = 0; c < nv; c++) acc[r][c] += load(aside + (r * PANEL + c) * LANES);
  }
  finish(acc, mr, nv, o, row, column);
}

/* Rows [from, to), a multiple of 8 of them, and columns [first, last), a multiple of LANES. Few columns: more rows at
   once, for enough sums under way. */
static __attribute__((noinline)) void product(Term t, Term more, Into o, long from, long to, long first, long last) {
  for (long c = first; c < last; c += PANEL * LANES) {
    const long nv = MIN((last - c) / LANES, PANEL);
    for (long r = from; r < to; r += 8) {
      if (nv == 1) {
        block(8, 1, t, more, o, r, c);
      } else if (nv == 2 && PANEL > 2) {
        block(8, 2, t, more, o, r, c);
      } else {
        for (long half = r; half < r + 8; half += 4) {
          if (nv == 2) block(4, 2, t, more, o, half, c);
#if PANEL > 2
          else if (nv == 3) block(4, 3, t, more, o, half, c);
          else block(4, 4, t, more, o, half, c);
#endif
        }
      }
    }
  }
}

static const Term NONE = {0};

/* Transposition. */

#if LANES == 16 && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SWAP(h, ...)                                                  \
  UNROLL for (int i = 0; i < 16; i++) if (!(i & h)) {                 \
    const vec a = r[i], b = r[i + h];                                 \
    r[i] = __builtin_shufflevector(a, b, LOW(h, __VA_ARGS__));        \
    r[i + h] = __builtin_shufflevector(a, b, HIGH(h, __VA_ARGS__));   \
  }
#define ONE_LOW(h, l) ((l) & (h) ? 16 + (l) - (h) : (l))
#define ONE_HIGH(h, l) ((l) & (h) ? 16 + (l) : (l) + (h))
#define EACH(f, h) f(h, 0), f(h, 1), f(h, 2), f(h, 3), f(h, 4), f(h, 5), f(h, 6), f(h, 7), f(h, 8), f(h, 9), \
  f(h, 10), f(h, 11), f(h, 12), f(h, 13), f(h, 14), f(h, 15)
#define LOW(h, ...) EACH(ONE_LOW, h)
#define HIGH(h, ...) EACH(ONE_HIGH, h)
#define IN_REGISTERS

INLINE void transposed_block(const float *from, long stride, float *to, long to_stride) {
  vec r[16];
  UNROLL for (int i = 0; i < 16; i++) r[i] = load(from + i * stride);
  SWAP(8, 0)
  SWAP(4, 0)
  SWAP(2, 0)
  SWAP(1, 0)
  UNROLL for (int i = 0; i < 16; i++) store(to + i * to_stride, r[i]);
}
#endif
#endif

/* from [n][width], rows `stride` apart -> to [width][T], zero beyond n tokens up to a multiple of 16. */
static void transpose(const float *from, long stride, long n, long width, float *to) {
  const long rows = UP(n, 16);
  long whole = 0, across = 0;
#ifdef IN_REGISTERS
  whole = n / 16 * 16, across = width / 16 * 16;
  for (long t = 0; t < whole; t += 16)
    for (long d = 0; d < across; d += 16) transposed_block(from + t * stride + d, stride, to + d * T + t, T);
#endif
  for (long d = 0; d < width; d++) {
    long t = d < across ? whole : 0;
    for (; t < n; t++) to[d * T + t] = from[t * stride + d];
    for (; t < rows; t++) to[d * T + t] = 0;
  }
}

/* Hedgehog's map. */

#define LOG2E 1.44269504088896341f
#define LN2_HIGH 0.693145751953125f
#define LN2_LOW 1.42860682030941723e-6f
#define ROUND 12582912.0f /* 1.5 * 2^23: a float this large has no fraction */

/* exp(x) and exp(-x), |x| <= SAFE or so: even and odd powers of the remainder, which they share. `rough`: to 6e-5 of
   them, for features that are rounded to bfloat16. */
INLINE void exp_both(vec x, vec *up, vec *down, const int rough) {
  const vec t = x * LOG2E + ROUND, n = t - ROUND;
  vec r = x - n * LN2_HIGH;
  r = r - n * LN2_LOW;
  const vec s = r * r;
  vec even = 0.5f + s * 4.16666666667e-2f, odd = all(1.66666666667e-1f);
  if (!rough) {
    even = 0.5f + s * (4.16666666667e-2f + s * (1.38888888889e-3f + s * 2.48015873e-5f));
    odd = 1.66666666667e-1f + s * (8.33333333333e-3f + s * 1.98412698e-4f);
  }
  even = 1.0f + s * even, odd = r * (1.0f + s * odd);
  const ivec power = (ivec)t << 23;
  *up = (vec)((ivec)(even + odd) + power);
  *down = (vec)((ivec)(even - odd) - power);
}

/* exp(x) of x <= 0. */
INLINE vec exp_below(vec x, const int rough) {
  vec up, down;
  exp_both(larger(all(-86.0f), x), &up, &down, rough);
  return up;
}

/* A vector of tokens. y, the first half rows of f, which lie `row` apart -> numerators of softmax(y) there and those of
   softmax(-y) in as many rows below, and 1 / their sums. */
INLINE void two_exponentials(float *f, long half, const long row, const int rough, vec *of_up, vec *of_down) {
  float *g = f + half * row;
  vec top = load(f), low = top, nan = 0.0f * top; /* whatever bits it has, which the exponential adds to */
  for (long i = 1; i < half; i++) {
    const vec y = load(f + i * row);
    top = larger(top, y);
    low = smaller(low, y);
    nan += 0.0f * y;
  }
  const vec middle = 0.5f * top + 0.5f * low, spread = 0.5f * top - 0.5f * low;
  const ivec far = spread > SAFE; /* each token for itself: a later one must not change an earlier one's rounding */
  int wide = 0;
  for (int l = 0; l < LANES; l++) wide |= far[l];
  vec sum_up = nan, sum_down = nan;
  if (wide) {
    for (long i = 0; i < half; i++) {
      const vec y = load(f + i * row);
      vec up, down;
      exp_both(y - middle, &up, &down, rough);
      up = either(far, exp_below(y - top, rough), up), down = either(far, exp_below(low - y, rough), down);
      sum_up += up, sum_down += down;
      store(f + i * row, up), store(g + i * row, down);
    }
  } else {
    for (long i = 0; i < half; i++) {
      vec up, down;
      exp_both(load(f + i * row) - middle, &up, &down, rough);
      sum_up += up, sum_down += down;
      store(f + i * row, up), store(g + i * row, down);
    }
  }
  *of_up = 1.0f / sum_up, *of_down = 1.0f / sum_down;
}

/* y [half][T] -> softmax(y) in the first half of f [2 half][T], softmax(-y) in the second. y is the first half. */
static void two_softmaxes(float *f, long half, long tokens) {
  float *g = f + half * T;
  const vec least = all(FLOOR);
  for (long t = 0; t < tokens; t += LANES) {
    vec of_up, of_down;
    two_exponentials(f + t, half, T, 0, &of_up, &of_down);
    for (long i = 0; i < half; i++) {
      store(f + i * T + t, larger(least, load(f + i * T + t) * of_up));
      store(g + i * T + t, larger(least, load(g + i * T + t) * of_down));
    }
  }
}

/* y [half][T] and what its features f [2 half][T] receive, d [2 half][T] -> what y receives, in the first half of d. */
static void two_softmaxes_back(const float *f, float *d, long half, long tokens) {
  const vec least = all(FLOOR);
  for (long t = 0; t < tokens; t += LANES) {
    vec of_up = {0}, of_down = {0};
    for (long i = 0; i < half; i++) {
      const vec up = load(f + i * T + t), down = load(f + (half + i) * T + t);
      of_up += masked(up * load(d + i * T + t), up > least);
      of_down += masked(down * load(d + (half + i) * T + t), down > least);
    }
    for (long i = 0; i < half; i++) {
      const vec up = load(f + i * T + t), down = load(f + (half + i) * T + t);
      const vec to_up = masked(load(d + i * T + t), up > least);
      const vec to_down = masked(load(d + (half + i) * T + t), down > least);
      store(d + i * T + t, up * (to_up - of_up) - down * (to_down - of_down));
    }
  }
}

/* W [D][half] and the bias below it, rows padded with zeros. */
static void pack(float *to, const float *weight, const float *bias, long D, long half, long padded) {
  memset(to, 0, sizeof(float) * (D + 1) * padded);
  for (long d = 0; d < D; d++) memcpy(to + d * padded, weight + d * half, sizeof(float) * half);
  if (bias) memcpy(to + D * padded, bias, sizeof(float) * half);
}

/* Features f [2 half][T] of rows x [n][D]. `across` [D + 1][T] holds x transposed. */
static void map(const float *x, const float *weight, int bias, long n, long D, long half, float *across, float *f) {
  const long rows = UP(n, 16), padded = UP(half, 8);
  transpose(x, D, n, D, across);
  if (bias)
    for (long t = 0; t < rows; t++) across[D * T + t] = 1.0f;
  const Term t = {weight, 1, padded, across, T, D + !!bias};
  const Into o = {f, T, 0, NULL, half, rows};
  product(t, NONE, o, 0, padded, 0, rows);
  two_softmaxes(f, half, rows);
}

/* Features of padded tokens, and beyond n tokens, are zero: they give nothing to a sum. */
static void clear_padded(float *f, const uint8_t *attended, long n, long F) {
  const long rows = UP(n, 16);
  for (long t = 0; t < rows; t++)
    if (t >= n || (attended && !attended[t]))
      for (long i = 0; i < F; i++) f[i * T + t] = 0;
}

/* Inputs and outputs, float32 or bfloat16. */

INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to even; NaN */
}

INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float found;
  memcpy(&found, &bits, sizeof found);
  return found;
}

/* Which of the n tokens are not padded, or NULL where all are. */
static const uint8_t *some_of(const uint8_t *attended, long n) {
  return attended && memchr(attended, 0, n) ? attended : NULL;
}

/* Rows [n][width] from element `at` of x on: where they lie, or in `to` if they are bfloat16 or some are padded, which
   are zero then. */
static const float *rows_of(const void *x, long at, long n, long width, int bf16, const uint8_t *attended, float *to) {
  if (!bf16 && !attended) return (const float *)x + at;
  if (bf16) {
    const uint16_t *from = (const uint16_t *)x + at;
    for (long i = 0; i < n * width; i++) to[i] = from_bf16(from[i]);
  } else {
    memcpy(to, (const float *)x + at, sizeof(float) * n * width);
  }
  for (long t = 0; attended && t < n; t++)
    if (!attended[t]) memset(to + t * width, 0, sizeof(float) * width);
  return to;
}

/* Where rows from element `at` on are to be written: in place, or in `aside` until `put` rounds them to bfloat16. */
INLINE float *place(void *x, long at, int bf16, float *aside) { return bf16 ? aside : (float *)x + at; }

static void put(void *x, long at, long count, int bf16, const float *aside) {
  if (!bf16) return;
  uint16_t *to = (uint16_t *)x + at;
  for (long i = 0; i < count; i++) to[i] = to_bf16(aside[i]);
}

/* rows [n][width] -> to [UP(n, 16)][wide], padded with zeros. */
static void pad_rows(const float *from, long stride, long n, long width, float *to, long wide) {
  for (long t = 0; t < n; t++) {
    memcpy(to + t * wide, from + t * stride, sizeof(float) * width);
    memset(to + t * wide + width, 0, sizeof(float) * (wide - width));
  }
  memset(to + n * wide, 0, sizeof(float) * (UP(n, 16) - n) * wide);
}

/* sums[i * stride] += sum over tokens of f[i][t], or of f[i][t] * weight[t]; 16 rows at a time. */
static void add_row_sums(const float *f, const float *weight, long count, long tokens, float *sums, long stride) {
  float part[16 * T], found[LANES * T];
  for (long i = 0; i < count; i += 16) {
    const long some = MIN(count - i, 16);
    memset(part, 0, sizeof part);
    for (long r = 0; r < some; r++) {
      vec sum = {0};
      for (long t = 0; t < tokens; t += LANES) {
        vec x = load(f + (i + r) * T + t);
        if (weight) x *= load(weight + t);
        sum += x;
      }
      store(part + r * LANES, sum);
    }
    transpose(part, LANES, 16, LANES, found);
    for (long r = 0; r < some; r++) {
      float sum = 0;
      for (long l = 0; l < LANES; l++) sum += found[l * T + r];
      sums[(i + r) * stride] += sum;
    }
  }
}

/* Heads, each by one of some threads. */

typedef struct Heads {
  void (*head)(const void *job, void *room, long l);
  const void *job;
  size_t room;
  long count;
  atomic_long next;
} Heads;

static void *work(void *given) {
  Heads *heads = given;
  void *room = NULL;
  if (posix_memalign(&room, 64, heads->room)) return NULL; /* the others do its heads */
  for (long l; (l = atomic_fetch_add(&heads->next, 1)) < heads->count;) heads->head(heads->job, room, l);
  free(room);
  return NULL;
}

/* The calling thread works too: threads that can't be started, or have no memory, are not missed. 0: done, else
   nothing is. */
static int run(void (*head)(const void *, void *, long), const void *job, size_t room, long count, long threads) {
  Heads heads = {.head = head, .job = job, .room = room, .count = count};
  pthread_t started[64];
  long others = 0;
  threads = MIN(MIN(threads, count), 65);
  while (others + 1 < threads && !pthread_create(&started[others], NULL, work, &heads)) others++;
  work(&heads);
  while (others) pthread_join(started[--others], NULL);
  return atomic_load(&heads.next) < count;
}
