/* The causal linear attention's forward pass, one head at a time, float32. Compiled by hhbench.native on first use.

   Tiles of T tokens are kept transposed: tokens lie along the lanes, so that both softmaxes of Hedgehog's map and the
   normaliser are sums of vectors, and no vector is summed over its lanes. Sums over tokens are formed tile by tile and
   then added to the state, which keeps them accurate in float32.

       fq, fk [F][T]    features             at [T][T]    at[j][i] = phi(k_j).phi(q_i), j <= i
       state  [F][E]    sum of phi(k) v^T    z [F]        sum of phi(k)
*/

#include <pthread.h>
#include <stdatomic.h>
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
#define TV (T / LANES)
#define MOST 128     /* of D, E and the width of a softmax */
#define FLOOR 1e-12f /* hhbench.linear_attention.FLOOR */
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

INLINE vec larger(vec a, vec b) {
#if LANES == 16
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
  return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  ivec take = a > b;
  return (vec)(((ivec)a & take) | ((ivec)b & ~take));
#endif
}

INLINE vec smaller(vec a, vec b) { return -larger(-a, -b); }

/* Products of matrices: mr rows and nv vectors of columns at a time, sum_k a(row, k) b[k]. */

typedef struct {
  const float *a; /* a(row, k) = a[row * row_stride + k * stride] */
  long row_stride, stride;
  const float *b; /* rows of vectors */
  long b_stride, depth;
} Term;

INLINE void accumulate(vec acc[8][PANEL], const int mr, const int nv, const Term t) {
  const float *a = t.a, *b = t.b;
  for (long k = 0; k < t.depth; k++, a += t.stride, b += t.b_stride) {
    vec row[PANEL];
    UNROLL for (int c = 0; c < nv; c++) row[c] = load(b + c * LANES);
    UNROLL for (int r = 0; r < mr; r++) {
      const vec s = all(a[r * t.row_stride]);
      UNROLL for (int c = 0; c < nv; c++) acc[r][c] += s * row[c];
    }
  }
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
  accumulate(acc, mr, nv, at_place(t, row, column));
  if (more.depth) accumulate(acc, mr, nv, at_place(more, row, column));
  finish(acc, mr, nv, o, row, column);
}

/* Rows [from, to), a multiple of 8 of them, and columns [first, last), a multiple of LANES. Few columns: more rows at
   once, for enough sums under way. */
INLINE void product(Term t, Term more, Into o, long from, long to, long first, long last) {
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

/* from [n][width] -> to [width][T], zero beyond n tokens up to a multiple of 16. */
static void transpose(const float *from, long n, long width, float *to) {
  const long rows = UP(n, 16);
  long whole = 0, across = 0;
#ifdef IN_REGISTERS
  whole = n / 16 * 16, across = width / 16 * 16;
  for (long t = 0; t < whole; t += 16)
    for (long d = 0; d < across; d += 16) transposed_block(from + t * width + d, width, to + d * T + t, T);
#endif
  for (long d = 0; d < width; d++) {
    long t = d < across ? whole : 0;
    for (; t < n; t++) to[d * T + t] = from[t * width + d];
    for (; t < rows; t++) to[d * T + t] = 0;
  }
}

/* Hedgehog's map. */

#define LOG2E 1.44269504088896341f
#define LN2_HIGH 0.693145751953125f
#define LN2_LOW 1.42860682030941723e-6f
#define ROUND 12582912.0f /* 1.5 * 2^23: a float this large has no fraction */

/* exp(x) and exp(-x), |x| <= SAFE or so: even and odd powers of the remainder, which they share. */
INLINE void exp_both(vec x, vec *up, vec *down) {
  const vec t = x * LOG2E + ROUND, n = t - ROUND;
  vec r = x - n * LN2_HIGH;
  r = r - n * LN2_LOW;
  const vec s = r * r;
  const vec even = 1.0f + s * (0.5f + s * (4.16666666667e-2f + s * (1.38888888889e-3f + s * 2.48015873e-5f)));
  const vec odd = r * (1.0f + s * (1.66666666667e-1f + s * (8.33333333333e-3f + s * 1.98412698e-4f)));
  const ivec power = (ivec)t << 23;
  *up = (vec)((ivec)(even + odd) + power);
  *down = (vec)((ivec)(even - odd) - power);
}

/* exp(x) of x <= 0. */
INLINE vec exp_below(vec x) {
  vec up, down;
  exp_both(larger(x, all(-86.0f)), &up, &down);
  return up;
}

/* y [half][T] -> softmax(y) in the first half of f [2 half][T], softmax(-y) in the second. y is the first half. */
static void two_softmaxes(float *f, long half, long tokens) {
  float *g = f + half * T;
  for (long t = 0; t < tokens; t += LANES) {
    vec top = load(f + t), low = top;
    for (long i = 1; i < half; i++) {
      const vec y = load(f + i * T + t);
      top = larger(top, y);
      low = smaller(low, y);
    }
    const vec middle = 0.5f * top + 0.5f * low, spread = 0.5f * top - 0.5f * low;
    int wide = 0;
    for (int l = 0; l < LANES; l++) wide |= spread[l] > SAFE;
    vec sum_up = {0}, sum_down = {0};
    if (wide) {
      for (long i = 0; i < half; i++) {
        const vec y = load(f + i * T + t), up = exp_below(y - top), down = exp_below(low - y);
        sum_up += up, sum_down += down;
        store(f + i * T + t, up), store(g + i * T + t, down);
      }
    } else {
      for (long i = 0; i < half; i++) {
        vec up, down;
        exp_both(load(f + i * T + t) - middle, &up, &down);
        sum_up += up, sum_down += down;
        store(f + i * T + t, up), store(g + i * T + t, down);
      }
    }
    const vec of_up = 1.0f / sum_up, of_down = 1.0f / sum_down, least = all(FLOOR);
    for (long i = 0; i < half; i++) {
      store(f + i * T + t, larger(load(f + i * T + t) * of_up, least));
      store(g + i * T + t, larger(load(g + i * T + t) * of_down, least));
    }
  }
}

/* A head. */

typedef struct {
  float x[(MOST + 1) * T], fq[2 * MOST * T], fk[2 * MOST * T], at[T * T], v[T * MOST];
  float state[2 * MOST * MOST], z[2 * MOST], of_den[T];
  float wq[(MOST + 1) * MOST], wk[(MOST + 1) * MOST];
  float part[16 * T];
} Work;

/* The outputs of a tile of n tokens, and the state after it. */
static void tile(Work *w, long n, long F, long E, float *out, int first, int last) {
  const long rows = UP(n, 16), wide = UP(E, LANES), features = UP(F, 16);
  const long height = LANES >= 8 ? LANES : 8;
  for (long j = 0; j < rows; j += height) {
    const Term t = {w->fk, 1, T, w->fq, T, F};
    const Into o = {w->at, T, 0, NULL, rows, rows};
    product(t, NONE, o, j, j + height, j, rows);
    for (long r = j; r < j + height; r++)
      for (long i = j; i < r; i++) w->at[r * T + i] = 0; /* a later key */
  }
  for (long i = 0; i < rows; i += LANES) {
    vec den[4] = {{0}};
    if (!first)
      for (long f = 0; f < F; f++) den[f % 4] += all(w->z[f]) * load(w->fq + f * T + i);
    for (long j = 0; j < i + LANES; j++) den[j % 4] += load(w->at + j * T + i);
    const vec sum = (den[0] + den[1]) + (den[2] + den[3]);
    const ivec blind = sum == 0.0f;
    store(w->of_den + i, (vec)((ivec)(1.0f / sum) & ~blind));
  }
  for (long i = 0; i < rows; i += 8) {
    const Term near = {w->at, 1, T, w->v, wide, i + 8};
    const Term far = {w->fq, 1, T, w->state, wide, first ? 0 : F};
    const Into o = {out, E, 0, w->of_den, n, E};
    product(near, far, o, i, i + 8, 0, wide);
  }
  if (last) return;
  const Term t = {w->fk, T, 1, w->v, wide, rows};
  const Into o = {w->state, wide, !first, NULL, features, wide};
  product(t, NONE, o, 0, features, 0, wide);
  for (long f = 0; f < features; f += 16) {
    for (long i = 0; i < 16; i++) {
      vec sum = {0};
      for (long j = 0; j < rows; j += LANES) sum += load(w->fk + (f + i) * T + j);
      store(w->part + i * LANES, sum);
    }
    float found[LANES * T];
    transpose(w->part, 16, LANES, found);
    for (long i = 0; i < 16; i++) {
      float sum = 0;
      for (long l = 0; l < LANES; l++) sum += found[l * T + i];
      w->z[f + i] = (first ? 0 : w->z[f + i]) + sum;
    }
  }
}

static void take_values(Work *w, const float *v, long n, long E, long stride) {
  const long rows = UP(n, 16), wide = UP(E, LANES);
  for (long j = 0; j < n; j++) {
    memcpy(w->v + j * wide, v + j * stride, sizeof(float) * E);
    memset(w->v + j * wide + E, 0, sizeof(float) * (wide - E));
  }
  memset(w->v + n * wide, 0, sizeof(float) * (rows - n) * wide);
}

/* Work on the heads, by some threads. */

typedef struct Job {
  void (*head)(const struct Job *, Work *, long);
  const float *q, *k, *v, *wq, *wk, *bq, *bk;
  float *out, *sums;
  long heads, kv_heads, all_heads, n, D, F, E, wq_heads, wk_heads, out_stride;
  int first, last;
  atomic_long next;
  atomic_int failed;
} Job;

static void *work(void *given) {
  Job *job = given;
  Work *w = NULL;
  if (posix_memalign((void **)&w, 64, sizeof *w)) {
    atomic_store(&job->failed, 1);
    return NULL;
  }
  for (long l; (l = atomic_fetch_add(&job->next, 1)) < job->all_heads;) job->head(job, w, l);
  free(w);
  return NULL;
}

/* The calling thread works too: threads that can't be started are not missed. */
static int run(Job *job, long threads) {
  pthread_t started[64];
  long count = 0;
  threads = MIN(MIN(threads, job->all_heads), 65);
  while (count + 1 < threads && !pthread_create(&started[count], NULL, work, job)) count++;
  work(job);
  while (count) pthread_join(started[--count], NULL);
  return atomic_load(&job->failed);
}

/* W [D][half] and the bias below it, rows padded with zeros. */
static void pack(float *to, const float *weight, const float *bias, long D, long half, long padded) {
  memset(to, 0, sizeof(float) * (D + 1) * padded);
  for (long d = 0; d < D; d++) memcpy(to + d * padded, weight + d * half, sizeof(float) * half);
  if (bias) memcpy(to + D * padded, bias, sizeof(float) * half);
}

static void map(Work *w, const float *x, const float *weight, int bias, long n, long D, long half, float *f) {
  const long rows = UP(n, 16), padded = UP(half, 8);
  transpose(x, n, D, w->x);
  if (bias)
    for (long t = 0; t < rows; t++) w->x[D * T + t] = 1.0f;
  const Term t = {weight, 1, padded, w->x, T, D + !!bias};
  const Into o = {f, T, 0, NULL, half, rows};
  product(t, NONE, o, 0, padded, 0, rows);
  two_softmaxes(f, half, rows);
}

/* Features beyond n tokens are zero: padding gives the state nothing. */
static void clear_after(float *f, long n, long F) {
  const long rows = UP(n, 16);
  for (long i = 0; n < rows && i < F; i++) memset(f + i * T + n, 0, sizeof(float) * (rows - n));
}

static void hedgehog_head(const Job *job, Work *w, long l) {
  const long N = job->n, D = job->D, half = job->F / 2, E = job->E, padded = UP(half, 8);
  const long b = l / job->heads, h = l % job->heads, g = h / (job->heads / job->kv_heads);
  const long kv = b * job->kv_heads + g;
  const long hq = job->wq_heads == 1 ? 0 : h, hk = job->wk_heads == job->heads ? h : job->wk_heads == 1 ? 0 : g;
  pack(w->wq, job->wq + hq * D * half, job->bq ? job->bq + hq * half : NULL, D, half, padded);
  pack(w->wk, job->wk + hk * D * half, job->bk ? job->bk + hk * half : NULL, D, half, padded);
  memset(w->fq + job->F * T, 0, sizeof(float) * (UP(job->F, 16) - job->F) * T);
  memset(w->fk + job->F * T, 0, sizeof(float) * (UP(job->F, 16) - job->F) * T);
  for (long s = 0; s < N; s += T) {
    const long n = MIN(N - s, T);
    map(w, job->q + (l * N + s) * D, w->wq, job->bq != NULL, n, D, half, w->fq);
    map(w, job->k + (kv * N + s) * D, w->wk, job->bk != NULL, n, D, half, w->fk);
    clear_after(w->fk, n, job->F);
    take_values(w, job->v + (kv * N + s) * E, n, E, E);
    tile(w, n, job->F, E, job->out + (l * N + s) * E, s == 0, s + T >= N);
  }
}

/* out [B, H, N, E] of q [B, H, N, D], k [B, G, N, D], v [B, G, N, E], W [heads, D, half] and biases [heads, half] or
   NULL; a head of W for each query head, each key-value head (keys only) or for all. 0: done. */
int hedgehog(const float *q, const float *k, const float *v, const float *wq, const float *wk, const float *bq,
             const float *bk, float *out, long B, long H, long G, long N, long D, long half, long E, long wq_heads,
             long wk_heads, long threads) {
  if (D > MOST || half > MOST || E > MOST) return 2;
  Job job = {.head = hedgehog_head, .q = q, .k = k, .v = v, .wq = wq, .wk = wk, .bq = bq, .bk = bk, .out = out,
             .heads = H, .kv_heads = G, .all_heads = B * H, .n = N, .D = D, .F = 2 * half, .E = E,
             .wq_heads = wq_heads, .wk_heads = wk_heads};
  return run(&job, threads);
}

static void features_head(const Job *job, Work *w, long l) {
  const long N = job->n, F = job->F, E = job->E, wide = UP(E, LANES);
  float *sums = job->sums + l * F * (E + 1);
  memset(w->state, 0, sizeof(float) * UP(F, 16) * wide);
  memset(w->z, 0, sizeof w->z);
  for (long f = 0; f < F && !job->first; f++) {
    memcpy(w->state + f * wide, sums + f * (E + 1), sizeof(float) * E);
    w->z[f] = sums[f * (E + 1) + E];
  }
  memset(w->fq + F * T, 0, sizeof(float) * (UP(F, 16) - F) * T);
  memset(w->fk + F * T, 0, sizeof(float) * (UP(F, 16) - F) * T);
  for (long s = 0; s < N; s += T) {
    const long n = MIN(N - s, T);
    transpose(job->q + (l * N + s) * F, n, F, w->fq);
    transpose(job->k + (l * N + s) * F, n, F, w->fk);
    take_values(w, job->v + (l * N + s) * (E + 1), n, E, E + 1);
    tile(w, n, F, E, job->out + l * job->out_stride + s * E, job->first && s == 0, job->last && s + T >= N);
  }
  for (long f = 0; f < F && !job->last; f++) {
    memcpy(sums + f * (E + 1), w->state + f * wide, sizeof(float) * E);
    sums[f * (E + 1) + E] = w->z[f];
  }
}

/* A block of N tokens: features fq and fk [L, N, F], values with a column of their own for 1 [L, N, E + 1], sums
   [L, F, E + 1] that are read unless this is the first block and written unless it is the last, outputs [N, E] of each
   head `out_stride` apart. 0: done. */
int features(const float *fq, const float *fk, const float *values, float *sums, float *out, long L, long N, long F,
             long E, long out_stride, int first, int last, long threads) {
  if (F > 2 * MOST || E > MOST) return 2;
  Job job = {.head = features_head, .q = fq, .k = fk, .v = values, .sums = sums, .out = out, .all_heads = L, .n = N,
             .F = F, .E = E, .out_stride = out_stride, .first = first, .last = last};
  return run(&job, threads);
}
