/* The causal linear attention, one head at a time: forward and backward. Compiled by hhbench.native on first use.

   Sums over tokens are formed tile by tile and then added to the state, which keeps them accurate in float32.

       fq, fk [F][T]    features             at [T][T]    at[j][i] = phi(k_j).phi(q_i), j <= i
       state  [F][E]    sum of phi(k) v^T    z [F]        sum of phi(k)
*/

#include "tiles.h"
#include "amx.h"

#define BLOCK 8 /* tiles between states that the forward pass keeps for the backward pass */

long tokens_between_starts(void) { return BLOCK * T; }

/* What hhbench.native hands over. Gradients that are NULL are not wanted. Gradients of keys, values and W come for each
   query head: whoever shares them adds them up. */
typedef struct {
  const void *q, *k, *v;          /* [B, H, N, D], [B, G, N, D], [B, G, N, E] */
  const uint8_t *attended;        /* [B, N], 0: padded; or NULL */
  const float *wq, *wk, *bq, *bk; /* [heads, D, half], [heads, half] or NULL */
  void *out;                      /* [B, H, N, E] */
  float *of_den, *starts; /* for the backward pass, or NULL: 1 / normaliser [B, H, N], [B, H, blocks, F, E + 1] */
  const void *d_out;      /* [B, H, N, E] */
  void *dq, *dk, *dv;     /* [B, H, N, D], [B, H, N, D], [B, H, N, E]; dk and dv are float32 where heads share keys */
  float *dwq, *dwk, *dbq, *dbk; /* [B, H, half, D], [B, H, half] */
  long B, H, G, N, D, half, E, wq_heads, wk_heads; /* a head of W for all, each query head, or each of keys */
  long bf16;                                       /* q, k, v, out and their gradients; else float32 */
} Attention;

/* Where a head finds what is its own. */
typedef struct {
  long b, query, key, wq, wk; /* sequence; query head and key head of all; heads of W */
} Place;

static Place place_of(const Attention *a, long l) {
  const long b = l / a->H, h = l % a->H, g = h / (a->H / a->G);
  return (Place){b, l, b * a->G + g, a->wq_heads == 1 ? 0 : h, a->wk_heads == a->H ? h : a->wk_heads == 1 ? 0 : g};
}

/* The state before a block of a head, [F][E + 1], that is kept for the backward pass, or NULL where none is. */
static float *start_of(const Attention *a, long l, long block) {
  const long blocks = UP(a->N, BLOCK * T) / (BLOCK * T);
  return a->starts ? a->starts + (l * blocks + block) * 2 * a->half * (a->E + 1) : NULL;
}

typedef struct {
  float across[(MOST + 1) * T], fq[2 * MOST * T], fk[2 * MOST * T], at[T * T], v[T * MOST];
  float state[2 * MOST * MOST], z[2 * MOST], of_den[T];
  float wq[(MOST + 1) * MOST], wk[(MOST + 1) * MOST], aside[T * MOST];
} Work;

/* at[j][i] = rows_j . columns_i, 0 where a query i would meet a later key j. */
INLINE void pairs(Term t, Term more, float *at, long rows) {
  const long height = LANES >= 8 ? LANES : 8;
  for (long j = 0; j < rows; j += height) {
    const Into o = {at, T, 0, NULL, rows, rows};
    product(t, more, o, j, j + height, j, rows);
    for (long r = j; r < j + height; r++)
      memset(at + r * T, 0, sizeof(float) * r);
  }
}

/* The outputs of a tile of n tokens, and the state after it. */
static void tile(Work *w, long n, long F, long E, float *out, int first, int last) {
  const long rows = UP(n, 16), wide = UP(E, LANES), features = UP(F, 16);
  pairs((Term){w->fk, 1, T, w->fq, T, F}, NONE, w->at, rows);
  for (long i = 0; i < rows; i += LANES) {
    vec den[4] = {{0}};
    if (!first)
      for (long f = 0; f < F; f++) den[f % 4] += all(w->z[f]) * load(w->fq + f * T + i);
    for (long j = 0; j < i + LANES; j++) den[j % 4] += load(w->at + j * T + i);
    const vec sum = (den[0] + den[1]) + (den[2] + den[3]);
    store(w->of_den + i, masked(1.0f / sum, sum != 0.0f));
  }
  for (long i = 0; i < rows; i += 8) {
    const Term near = {w->at, 1, T, w->v, wide, i + 8};
    const Term far = {w->fq, 1, T, w->state, wide, first ? 0 : F};
    const Into o = {out, E, 0, w->of_den, n, E};
    product(near, far, o, i, i + 8, 0, wide);
  }
  if (last) return;
  const Into o = {w->state, wide, !first, NULL, features, wide};
  product((Term){w->fk, T, 1, w->v, wide, rows}, NONE, o, 0, features, 0, wide);
  if (first) memset(w->z, 0, sizeof w->z);
  add_row_sums(w->fk, NULL, F, rows, w->z, 1);
}

static void hedgehog_head(const void *job, void *room, long l) {
  const Attention *a = job;
  Work *w = room;
  const long N = a->N, D = a->D, half = a->half, F = 2 * half, E = a->E, wide = UP(E, LANES), padded = UP(half, 8);
  const Place at = place_of(a, l);
  pack(w->wq, a->wq + at.wq * D * half, a->bq ? a->bq + at.wq * half : NULL, D, half, padded);
  pack(w->wk, a->wk + at.wk * D * half, a->bk ? a->bk + at.wk * half : NULL, D, half, padded);
  memset(w->fq + F * T, 0, sizeof(float) * (UP(F, 16) - F) * T);
  memset(w->fk + F * T, 0, sizeof(float) * (UP(F, 16) - F) * T);
  for (long s = 0; s < N; s += T) {
    const long n = MIN(N - s, T);
    const uint8_t *attended = a->attended ? some_of(a->attended + at.b * N + s, n) : NULL;
    float *start = s % (BLOCK * T) ? NULL : start_of(a, l, s / (BLOCK * T));
    for (long f = 0; f < F && s && start; f++) {
      memcpy(start + f * (E + 1), w->state + f * wide, sizeof(float) * E);
      start[f * (E + 1) + E] = w->z[f];
    }
    const float *q = rows_of(a->q, (at.query * N + s) * D, n, D, a->bf16, attended, w->aside);
    map(q, w->wq, a->bq != NULL, n, D, half, w->across, w->fq);
    const float *k = rows_of(a->k, (at.key * N + s) * D, n, D, a->bf16, attended, w->aside);
    map(k, w->wk, a->bk != NULL, n, D, half, w->across, w->fk);
    clear_padded(w->fk, attended, n, F);
    const float *v = rows_of(a->v, (at.key * N + s) * E, n, E, a->bf16, attended, w->aside);
    pad_rows(v, E, n, E, w->v, wide);
    const long to = (at.query * N + s) * E;
    tile(w, n, F, E, place(a->out, to, a->bf16, w->aside), s == 0, s + T >= N);
    put(a->out, to, n * E, a->bf16, w->aside);
    if (a->of_den) memcpy(a->of_den + at.query * N + s, w->of_den, sizeof(float) * n);
  }
}

#define WIDEST 64 /* softmax in AMX; its width is a multiple of 32, as D and E are */

#ifdef AMX
/* The same of bfloat16 in the registers of AMX. Features and the weights of pairs are rounded to bfloat16, W and the
   state are read as sums of two matrices of bfloat16, and sums are float32. ROWS queries at a time:

       weights [ROWS][T]      phi(q_i).phi(k_j), j <= i
       out     [ROWS][E + 16] numerators and, in column E, the normaliser
       state   [F][E + 16]    sum of phi(k) [v, 1]^T, padded
*/

typedef struct {
  pair high[WIDEST * MOST / 2], low[WIDEST * MOST / 2]; /* left factors [half][D] */
  const float *bias;
} __attribute__((aligned(64))) Weight; /* what follows one lies on whole cache lines, as everything here does */

typedef struct {
  Weight wq, wk;
  float f[2 * WIDEST * ROWS], weights[ROWS * T], out[ROWS * (MOST + 16)], state[2 * WIDEST * (MOST + 16)], seen[T];
  pair across[MOST / 2 * ROWS], q_right[WIDEST * ROWS], q_left[T * WIDEST]; /* the left one [T][F / 2] */
  pair k_right[WIDEST * T], k_left[2 * WIDEST * T / 2];                     /* [F / 2][T], [F][T / 2] */
  pair weights_left[ROWS * T / 2], v_right[T / 2 * (MOST + 16)];
  pair state_right[WIDEST * (MOST + 16)], state_rest[WIDEST * (MOST + 16)], rows[T * MOST / 2];
} Rounded;

/* W [D][half] as a sum of two. */
static void split(Weight *to, const float *weight, const float *bias, long D, long half) {
  for (long m = 0; m < half; m++) {
    for (long d = 0; d < D; d++) {
      const float x = weight[d * half + m];
      const uint16_t high = to_bf16(x), low = to_bf16(x - from_bf16(high));
      memcpy((char *)to->high + 2 * (m * D + d), &high, sizeof high);
      memcpy((char *)to->low + 2 * (m * D + d), &low, sizeof low);
    }
  }
  to->bias = bias;
}

/* T rows [T][width] from element `at` of x on, zero beyond n and where padded: where they lie, or in `to`. */
static const uint16_t *whole_rows(const void *x, long at, long n, long width, const uint8_t *attended, pair *to) {
  const uint16_t *from = (const uint16_t *)x + at;
  if (n == T && !attended) return from;
  memset(to, 0, 2 * T * width);
  for (long t = 0; t < n; t++)
    if (!attended || attended[t]) memcpy((char *)to + 2 * t * width, from + t * width, 2 * width);
  return (const uint16_t *)to;
}

/* Features of x [ROWS][D], numbers of bfloat16, as a right factor [F / 2][ROWS], `stride` apart. Those of keys as a
   left one too, [F][ROWS / 2], T / 2 apart, and zero where the key is not seen. */
INLINE void map_rounded(const uint16_t *x, const Weight *weight, long D, long half, Rounded *w, pair *right,
                        const long stride, pair *left, const float *seen) {
  for (long d = 0; d < D / 2; d += 16) /* pairs go the way of floats, untouched */
    for (long t = 0; t < ROWS; t += 16)
      transposed_block((const float *)x + t * (D / 2) + d, D / 2, (float *)w->across + d * ROWS + t, ROWS);
  for (long m = 0; m < half; m += ROWS) {
    const long at = m * (D / 2);
    const Product logits = {weight->high + at, weight->low + at, D / 2, w->across, NULL, ROWS, D / 2};
    amx_rows(&logits, 1, w->f + m * ROWS, ROWS, 0, ROWS);
  }
  for (long t = 0; t < ROWS; t += 16) {
    float *f = w->f + t;
    for (long m = 0; m < half && weight->bias; m++) store(f + m * ROWS, load(f + m * ROWS) + weight->bias[m]);
    vec of[2];
    two_exponentials(f, half, ROWS, 1, &of[0], &of[1]);
    const vec least = all(FLOOR);
    ivec takes = ~(ivec){0};
    if (left) takes = load(seen + t) != 0.0f;
    for (int side = 0; side < 2; side++) {
      const vec scale = of[side];
      for (long m = side * half; m < (side + 1) * half; m += 2) {
        const vec even = masked(larger(least, load(f + m * ROWS) * scale), takes);
        const vec odd = masked(larger(least, load(f + (m + 1) * ROWS) * scale), takes);
        put_side_by_side(right + m / 2 * stride + t, even, odd);
        if (left) put_16(left + m * (T / 2) + t / 2, even), put_16(left + (m + 1) * (T / 2) + t / 2, odd);
      }
    }
  }
}

static void hedgehog_head_rounded(const void *job, void *room, long l) {
  const Attention *a = job;
  Rounded *w = room;
  const long N = a->N, D = a->D, half = a->half, F = 2 * half, E = a->E, wide = E + 16;
  const Place at = place_of(a, l);
  split(&w->wq, a->wq + at.wq * D * half, a->bq ? a->bq + at.wq * half : NULL, D, half);
  split(&w->wk, a->wk + at.wk * D * half, a->bk ? a->bk + at.wk * half : NULL, D, half);
  Layout before;
  amx_begins(&before);
  for (long s = 0; s < N; s += T) {
    const long n = MIN(N - s, T), in = at.key * N + s, out = at.query * N + s;
    const uint8_t *attended = a->attended ? some_of(a->attended + at.b * N + s, n) : NULL;
    float *start = s % (BLOCK * T) ? NULL : start_of(a, l, s / (BLOCK * T));
    for (long f = 0; f < F && s && start; f++)
      memcpy(start + f * (E + 1), w->state + f * wide, sizeof(float) * (E + 1));
    for (long t = 0; t < T; t++) w->seen[t] = t < n && (!attended || attended[t]);
    const uint16_t *q = whole_rows(a->q, out * D, n, D, attended, w->rows);
    for (long t = 0; t < n; t += ROWS) {
      map_rounded(q + t * D, &w->wq, D, half, w, w->q_right, ROWS, NULL, NULL);
      for (long f = 0; f < half; f += 16)
        for (long i = 0; i < ROWS; i += 16)
          transposed_block((float *)w->q_right + f * ROWS + i, ROWS, (float *)w->q_left + (t + i) * WIDEST + f, WIDEST);
    }
    const uint16_t *k = whole_rows(a->k, in * D, n, D, attended, w->rows);
    for (long t = 0; t < T; t += ROWS)
      map_rounded(k + t * D, &w->wk, D, half, w, w->k_right + t, T, w->k_left + t / 2, w->seen + t);
    to_right_with_ones(whole_rows(a->v, in * E, n, E, attended, w->rows), E, w->v_right);

    for (long from = 0; from < n; from += ROWS) { /* these queries meet no later keys */
      const long to = from + ROWS;
      const pair *left = w->q_left + from * WIDEST;
      amx_rows(&(Product){left, NULL, WIDEST, w->k_right, NULL, T, half}, 1, w->weights, T, 0, to);
      lower_to_left(w->weights, from, to, w->weights_left);
      const Product near_and_far[2] = {
        {w->weights_left, NULL, T / 2, w->v_right, NULL, wide, to / 2},
        {left, NULL, WIDEST, w->state_right, w->state_rest, wide, half},
      };
      amx_rows(near_and_far, s ? 2 : 1, w->out, wide, 0, wide);
      for (long i = from; i < MIN(n, to); i++) {
        const float *x = w->out + (i - from) * wide, den = x[E], of_den = den != 0.0f ? 1.0f / den : 0.0f;
        for (long e = 0; e < E; e += 32)
          put_32((char *)a->out + 2 * ((out + i) * E + e), load(x + e) * of_den, load(x + e + 16) * of_den, 0xffffffff);
        if (a->of_den) a->of_den[out + i] = of_den;
      }
    }
    for (long f = 0; f < F && s + T < N; f += ROWS) {
      const Product more = {w->k_left + f * (T / 2), NULL, T / 2, w->v_right, NULL, wide, T / 2};
      amx_rows(&more, 1, w->state + f * wide, wide, s > 0, wide);
      to_right(w->state + f * wide, ROWS, wide, w->state_right + f / 2 * wide, w->state_rest + f / 2 * wide);
    }
  }
  amx_ends(&before);
}

#endif

/* Whether the outputs are formed in AMX. */
int is_rounded(const Attention *a) {
  return a->bf16 && a->D % 32 == 0 && a->E % 32 == 0 && a->half % 32 == 0 && a->half <= WIDEST && has_amx();
}

/* The outputs; 0: done. */
int hedgehog(const Attention *a, long threads) {
  if (a->D > MOST || a->half > MOST || a->E > MOST) return 2;
#ifdef AMX
  if (is_rounded(a)) return run(hedgehog_head_rounded, a, sizeof(Rounded), a->B * a->H, threads);
#endif
  return run(hedgehog_head, a, sizeof(Work), a->B * a->H, threads);
}

/* The backward pass. With g_i = do_i / normaliser_i and h_i = -(do_i . out_i) / normaliser_i:

       p [T][T]           p[j][i] = g_i . v_j + h_i, j <= i: what phi(k_j).phi(q_i) receives
       states [F][E + 1]  the sum of phi(k) [v, 1]^T over the tokens before each tile of a block
       rest   [F][E + 1]  the sum of phi(q) [g, h]^T over the tokens after a tile

   Block by block from the last, the states are summed again forwards, then tiles are taken backwards. */

#define ROW (MOST + LANES) /* of a state, with its last column */

typedef struct {
  float fk[BLOCK][2 * MOST * T], states[BLOCK][2 * MOST * ROW], rest[2 * MOST * ROW];
  float fq[2 * MOST * T], at[T * T], p[T * T], across_p[T * T];
  float v[T * MOST], g[T * MOST], across_v[(MOST + 1) * T], across_g[(MOST + 1) * T], h[T], x[T * MOST];
  float dfq[2 * MOST * T], dfk[2 * MOST * T], across[(MOST + 1) * T];
  float wq[(MOST + 1) * MOST], wk[(MOST + 1) * MOST], of_wq[MOST * MOST], of_wk[MOST * MOST]; /* of_w [half][D] */
  float dwq[MOST * MOST], dwk[MOST * MOST], dbq[MOST], dbk[MOST];
  float q_rows[T * MOST], k_rows[T * MOST], v_rows[T * MOST], out_rows[T * MOST], d_out_rows[T * MOST], aside[T * MOST];
} Back;

/* W transposed, [half][D], rows padded with zeros. */
static void pack_across(float *to, const float *weight, long D, long half, long wide) {
  memset(to, 0, sizeof(float) * half * wide);
  for (long d = 0; d < D; d++)
    for (long m = 0; m < half; m++) to[m * wide + d] = weight[d * half + m];
}

/* state += sum of f_t [x_t, weight_t]^T, weight 1 where it is NULL; weights are the column after the last of x. */
static void add_to_state(float *state, long row, const float *f, const float *x, const float *weight, long rows, long F,
                         long E) {
  const long wide = UP(E, LANES), features = UP(F, 16);
  const Into o = {state, row, 1, NULL, features, wide};
  product((Term){f, T, 1, x, wide, rows}, NONE, o, 0, features, 0, wide);
  add_row_sums(f, weight, F, rows, state + E, row);
}

/* What x [n][D] and W receive through the map, from what the features f did, d. */
static void map_back(const float *x, const float *f, float *d, const float *of_w, long n, long D, long half,
                     float *padded, float *dx, float *dw, float *db) {
  const long rows = UP(n, 16), wide = UP(D, LANES), high = UP(half, 8);
  two_softmaxes_back(f, d, half, rows);
  if (dx) {
    const Into o = {dx, D, 0, NULL, n, D};
    product((Term){d, 1, T, of_w, wide, half}, NONE, o, 0, rows, 0, wide);
  }
  if (dw) {
    if (D % LANES || n % 16) pad_rows(x, D, n, D, padded, wide), x = padded;
    const Into o = {dw, wide, 1, NULL, half, wide};
    product((Term){d, T, 1, x, wide, rows}, NONE, o, 0, high, 0, wide);
  }
  if (db) add_row_sums(d, NULL, half, rows, db, 1);
}

static void tile_back(const Attention *a, Back *w, Place at, long s, float *fk, float *state, int first, int last) {
  const long N = a->N, n = MIN(N - s, T), D = a->D, half = a->half, F = 2 * half, E = a->E;
  const long rows = UP(n, 16), wide = UP(E, LANES), row = wide + LANES, features = UP(F, 8);
  const uint8_t *attended = a->attended ? some_of(a->attended + at.b * N + s, n) : NULL;
  const int bf16 = a->bf16, bf16_keys = bf16 && a->G == a->H;
  const long of_q = (at.query * N + s) * D, of_out = (at.query * N + s) * E;
  const float *q = rows_of(a->q, of_q, n, D, bf16, attended, w->q_rows);
  const float *k = rows_of(a->k, (at.key * N + s) * D, n, D, bf16, attended, w->k_rows);
  const float *v = rows_of(a->v, (at.key * N + s) * E, n, E, bf16, attended, w->v_rows);
  const float *out = rows_of(a->out, of_out, n, E, bf16, NULL, w->out_rows);
  const float *d_out = rows_of(a->d_out, of_out, n, E, bf16, NULL, w->d_out_rows);
  map(q, w->wq, a->bq != NULL, n, D, half, w->across, w->fq);
  pad_rows(v, E, n, E, w->v, wide);
  transpose(v, E, n, E, w->across_v);
  for (long i = 0; i < rows; i++) w->across_v[E * T + i] = i < n;

  memset(w->g, 0, sizeof(float) * rows * wide);
  memset(w->h, 0, sizeof w->h);
  for (long i = 0; i < n; i++) {
    const float of_den = a->of_den[at.query * N + s + i];
    float sum = 0;
    for (long e = 0; e < E; e++) w->g[i * wide + e] = d_out[i * E + e] * of_den;
    for (long e = 0; e < E; e++) sum += w->g[i * wide + e] * out[i * E + e];
    w->h[i] = -sum;
  }
  transpose(w->g, wide, rows, E, w->across_g);
  memcpy(w->across_g + E * T, w->h, sizeof(float) * rows);

  pairs((Term){fk, 1, T, w->fq, T, F}, NONE, w->at, rows);
  static const float one = 1.0f;
  pairs((Term){w->v, wide, 1, w->across_g, T, E}, (Term){&one, 0, 0, w->h, T, 1}, w->p, rows);
  transpose(w->p, T, rows, rows, w->across_p);

  const Into to_q = {w->dfq, T, 0, NULL, features, rows}, to_k = {w->dfk, T, 0, NULL, features, rows};
  for (long from = 0, to; from < rows; from = to) { /* queries meet no later keys: half of the pairs at a time */
    to = MIN(from + T / 2, rows);
    const Term near_q = {fk, T, 1, w->p, T, to}, near_k = {w->fq + from, T, 1, w->across_p + from * T, T, rows - from};
    product(near_q, (Term){state, row, 1, w->across_g, T, first ? 0 : E + 1}, to_q, 0, features, from, to);
    product(near_k, (Term){w->rest, row, 1, w->across_v, T, last ? 0 : E + 1}, to_k, 0, features, from, to);
  }
  if (a->dv) {
    float *to = place(a->dv, of_out, bf16_keys, w->aside);
    for (long j = 0; j < rows; j += 8) {
      const Into o = {to, E, 0, NULL, n, E};
      const Term near = {w->at + j, T, 1, w->g + j * wide, wide, rows - j}; /* from the first query that meets these */
      const Term far = {fk, 1, T, w->rest, row, last ? 0 : F};
      product(near, far, o, j, j + 8, 0, wide);
    }
    put(a->dv, of_out, n * E, bf16_keys, w->aside);
  }
  add_to_state(w->rest, row, w->fq, w->g, w->h, rows, F, E);

  float *dq = a->dq ? place(a->dq, of_q, bf16, w->aside) : NULL;
  map_back(q, w->fq, w->dfq, w->of_wq, n, D, half, w->x, dq, a->dwq ? w->dwq : NULL, a->dbq ? w->dbq : NULL);
  if (dq) {
    for (long i = 0; attended && i < n; i++)
      if (!attended[i]) memset(dq + i * D, 0, sizeof(float) * D);
    put(a->dq, of_q, n * D, bf16, w->aside);
  }
  float *dk = a->dk ? place(a->dk, of_q, bf16_keys, w->aside) : NULL;
  map_back(k, fk, w->dfk, w->of_wk, n, D, half, w->x, dk, a->dwk ? w->dwk : NULL, a->dbk ? w->dbk : NULL);
  if (dk) put(a->dk, of_q, n * D, bf16_keys, w->aside);
}

static void hedgehog_back_head(const void *job, void *room, long l) {
  const Attention *a = job;
  Back *w = room;
  const long N = a->N, D = a->D, half = a->half, F = 2 * half, E = a->E, padded = UP(half, 8);
  const long wide = UP(E, LANES), row = wide + LANES, across = UP(D, LANES), features = UP(F, 16);
  const Place at = place_of(a, l);
  pack(w->wq, a->wq + at.wq * D * half, a->bq ? a->bq + at.wq * half : NULL, D, half, padded);
  pack(w->wk, a->wk + at.wk * D * half, a->bk ? a->bk + at.wk * half : NULL, D, half, padded);
  pack_across(w->of_wq, a->wq + at.wq * D * half, D, half, across);
  pack_across(w->of_wk, a->wk + at.wk * D * half, D, half, across);
  memset(w->rest, 0, sizeof(float) * features * row);
  memset(w->dwq, 0, sizeof w->dwq), memset(w->dwk, 0, sizeof w->dwk);
  memset(w->dbq, 0, sizeof w->dbq), memset(w->dbk, 0, sizeof w->dbk);
  memset(w->fq + F * T, 0, sizeof(float) * (features - F) * T);
  for (long i = 0; i < BLOCK; i++) memset(w->fk[i] + F * T, 0, sizeof(float) * (features - F) * T);
  const long blocks = UP(N, BLOCK * T) / (BLOCK * T);
  for (long block = blocks - 1; block >= 0; block--) {
    const long begin = block * BLOCK * T, tiles = MIN(UP(N - begin, T) / T, BLOCK);
    const float *start = start_of(a, l, block);
    memset(w->states[0], 0, sizeof(float) * features * row);
    for (long f = 0; f < F && block; f++) memcpy(w->states[0] + f * row, start + f * (E + 1), sizeof(float) * (E + 1));
    for (long i = 0; i < tiles; i++) {
      const long s = begin + i * T, n = MIN(N - s, T);
      const uint8_t *attended = a->attended ? some_of(a->attended + at.b * N + s, n) : NULL;
      const float *k = rows_of(a->k, (at.key * N + s) * D, n, D, a->bf16, attended, w->k_rows);
      map(k, w->wk, a->bk != NULL, n, D, half, w->across, w->fk[i]);
      clear_padded(w->fk[i], attended, n, F);
      if (i + 1 == tiles) break;
      const float *v = rows_of(a->v, (at.key * N + s) * E, n, E, a->bf16, attended, w->v_rows);
      pad_rows(v, E, n, E, w->v, wide);
      memcpy(w->states[i + 1], w->states[i], sizeof(float) * features * row);
      add_to_state(w->states[i + 1], row, w->fk[i], w->v, NULL, UP(n, 16), F, E);
    }
    for (long i = tiles - 1; i >= 0; i--)
      tile_back(a, w, at, begin + i * T, w->fk[i], w->states[i], !block && !i, block + 1 == blocks && i + 1 == tiles);
  }
  for (long m = 0; m < half; m++) {
    if (a->dwq) memcpy(a->dwq + (l * half + m) * D, w->dwq + m * across, sizeof(float) * D);
    if (a->dwk) memcpy(a->dwk + (l * half + m) * D, w->dwk + m * across, sizeof(float) * D);
  }
  if (a->dbq) memcpy(a->dbq + l * half, w->dbq, sizeof(float) * half);
  if (a->dbk) memcpy(a->dbk + l * half, w->dbk, sizeof(float) * half);
}

/* What the inputs and W receive from d_out; 0: done. */
int hedgehog_back(const Attention *a, long threads) {
  if (a->D > MOST || a->half > MOST || a->E > MOST) return 2;
  return run(hedgehog_back_head, a, sizeof(Back), a->B * a->H, threads);
}

/* Any features, block by block. */

typedef struct {
  const float *fq, *fk, *values;
  float *sums, *out;
  long n, F, E, out_stride;
  int first, last;
} Features;

static void features_head(const void *job, void *room, long l) {
  const Features *a = job;
  Work *w = room;
  const long N = a->n, F = a->F, E = a->E, wide = UP(E, LANES);
  float *sums = a->sums + l * F * (E + 1);
  memset(w->state, 0, sizeof(float) * UP(F, 16) * wide);
  memset(w->z, 0, sizeof w->z);
  for (long f = 0; f < F && !a->first; f++) {
    memcpy(w->state + f * wide, sums + f * (E + 1), sizeof(float) * E);
    w->z[f] = sums[f * (E + 1) + E];
  }
  memset(w->fq + F * T, 0, sizeof(float) * (UP(F, 16) - F) * T);
  memset(w->fk + F * T, 0, sizeof(float) * (UP(F, 16) - F) * T);
  for (long s = 0; s < N; s += T) {
    const long n = MIN(N - s, T);
    transpose(a->fq + (l * N + s) * F, F, n, F, w->fq);
    transpose(a->fk + (l * N + s) * F, F, n, F, w->fk);
    pad_rows(a->values + (l * N + s) * (E + 1), E + 1, n, E, w->v, wide);
    tile(w, n, F, E, a->out + l * a->out_stride + s * E, a->first && s == 0, a->last && s + T >= N);
  }
  for (long f = 0; f < F && !a->last; f++) {
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
  const Features a = {fq, fk, values, sums, out, N, F, E, out_stride, first, last};
  return run(features_head, &a, sizeof(Work), L, threads);
}
