/* One token of Hedgehog's causal linear attention after a state, float32. Compiled by hhbench.native on first use.

   A head's state is read once, again for each further query that shares it, and written once: each row takes the token
   in and then gives its share to the output.

       values [F][E]   sum of phi(k) v^T     keys [F]   sum of phi(k)     phi(x) = [softmax(x W + b), softmax(-x W - b)]
*/

#include "tiles.h"

/* Rows of a matrix. */

typedef struct {
  const float *rows;   /* [depth][width] */
  float *to;           /* rows + taken added^T, or NULL */
  const float *taken;  /* [depth] */
  const float *added;  /* [width] */
  const float *weight; /* [depth] */
  float *sum;          /* [width]: of the rows by their weights, with what was added */
  const float *start;  /* [width]: what the sum begins with, or NULL */
  long depth, width;
} Rows;

INLINE vec read_part(const float *p, const int whole, long n) {
  if (whole) return load(p);
  vec x = {0};
  memcpy(&x, p, sizeof(float) * n);
  return x;
}

INLINE void write_part(float *p, vec x, const int whole, long n) {
  memcpy(p, &x, whole ? sizeof x : sizeof(float) * n);
}

/* nv vectors of columns from c on, or n columns where they are no whole vector. Odd rows have sums of their own, so
   that more are under way. */
INLINE void columns(const Rows m, long c, const int nv, const int whole, long n) {
  vec sum[2][PANEL] = {{{0}}}, added[PANEL];
  UNROLL for (int i = 0; i < nv; i++) {
    if (m.start) sum[0][i] = read_part(m.start + c + i * LANES, whole, n);
    if (m.to) added[i] = read_part(m.added + c + i * LANES, whole, n);
  }
  for (long k = 0; k < m.depth; k += 2) {
    UNROLL for (int odd = 0; odd < 2; odd++) {
      if (k + odd == m.depth) break;
      const long at = (k + odd) * m.width + c;
      UNROLL for (int i = 0; i < nv; i++) {
        vec x = read_part(m.rows + at + i * LANES, whole, n);
        if (m.to) {
          x += all(m.taken[k + odd]) * added[i];
          write_part(m.to + at + i * LANES, x, whole, n);
        }
        sum[odd][i] += all(m.weight[k + odd]) * x;
      }
    }
  }
  UNROLL for (int i = 0; i < nv; i++) write_part(m.sum + c + i * LANES, sum[0][i] + sum[1][i], whole, n);
}

INLINE void weighted(const Rows m) {
  long c = 0;
  for (; c + PANEL * LANES <= m.width; c += PANEL * LANES) columns(m, c, PANEL, 1, 0);
  for (; c + LANES <= m.width; c += LANES) columns(m, c, 1, 1, 0);
  if (c < m.width) columns(m, c, 1, 0, m.width - c);
}

/* Hedgehog's map. */

/* softmax(y) of y [n], at or above FLOOR; NaN where any y is. y has room for whole vectors, and what lies beyond n is
   overwritten. */
static void one_softmax(float *y, long n, const float sign, float *to) {
  float e[UP(MOST, LANES)];
  float top = sign * y[0];
  for (long i = n; i < UP(n, LANES); i++) y[i] = y[0];
  vec tops = all(top);
  for (long i = 0; i < n; i += LANES) tops = larger(tops, sign * load(y + i));
  for (int l = 0; l < LANES; l++) top = tops[l] > top ? tops[l] : top;
  for (long i = 0; i < n; i += LANES) store(e + i, exp_below(sign * load(y + i) - top, 0));
  for (long i = n; i < UP(n, LANES); i++) e[i] = 0;
  vec sums = {0};
  float sum = 0;
  for (long i = 0; i < n; i += LANES) sums += load(e + i) + 0.0f * load(y + i);
  for (int l = 0; l < LANES; l++) sum += sums[l];
  const float scale = 1.0f / sum;
  for (long i = 0; i < n; i++) to[i] = e[i] * scale < FLOOR ? FLOOR : e[i] * scale;
}

static void features_of(const float *x, const float *weight, const float *bias, long D, long half, float *features) {
  float y[UP(MOST, LANES)];
  weighted((Rows){.rows = weight, .weight = x, .sum = y, .start = bias, .depth = D, .width = half});
  one_softmax(y, half, 1.0f, features);
  one_softmax(y, half, -1.0f, features + half);
}

/* The outputs [B, H, E] for one token's q [B, H, D], k [B, G, D] and v [B, G, E], and the state after it. States are
   [B, S, F, E] and [B, S, F], F = 2 half, for each query head (S = H) or each key-value head (S = G). W [heads, D,
   half] and biases [heads, half] or NULL: a head for each query head (queries), each state (keys), or for all. half is
   at most MOST. */
void step(const float *q, const float *k, const float *v, const float *wq, const float *wk, const float *bq,
          const float *bk, const float *values, const float *keys, float *new_values, float *new_keys, float *out,
          long B, long H, long G, long S, long D, long half, long E, long wq_heads, long wk_heads) {
  const long F = 2 * half, group = H / S;
  float fq[2 * MOST], fk[2 * MOST];
  for (long l = 0; l < B * S; l++) {
    const long s = l % S, kv = l / S * G + s / (S / G), hk = wk_heads == 1 ? 0 : s;
    features_of(k + kv * D, wk + hk * D * half, bk ? bk + hk * half : NULL, D, half, fk);
    for (long f = 0; f < F; f++) new_keys[l * F + f] = keys[l * F + f] + fk[f];
    for (long r = 0; r < group; r++) {
      const long h = s * group + r, hq = wq_heads == 1 ? 0 : h;
      float *to = out + (l * group + r) * E;
      features_of(q + (l * group + r) * D, wq + hq * D * half, bq ? bq + hq * half : NULL, D, half, fq);
      if (r == 0)
        weighted((Rows){values + l * F * E, new_values + l * F * E, fk, v + kv * E, fq, to, NULL, F, E});
      else
        weighted((Rows){.rows = new_values + l * F * E, .weight = fq, .sum = to, .depth = F, .width = E});
      float sum = 0;
      for (long f = 0; f < F; f++) sum += fq[f] * new_keys[l * F + f];
      for (long e = 0; e < E; e++) to[e] /= sum;
    }
  }
}
