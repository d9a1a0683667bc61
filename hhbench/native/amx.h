/* Products of bfloat16 matrices, summed in float32, in the tile registers of AMX: 16 rows of 16 sums, 32 products each.

   A left factor has its rows of bfloat16 as they are; a right factor has two rows of it side by side, as pairs:

       left [rows][2 depth]    right [depth][columns], low half from row 2 k, high half from row 2 k + 1
*/

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__) && defined(IN_REGISTERS)
#define AMX
#define ROWS 32 /* of a product at a time */
#include <sys/syscall.h>
#include <unistd.h>

typedef uint32_t pair;

typedef struct {
  uint8_t palette, first_row, zero[14];
  uint16_t bytes[16]; /* of a row of each register */
  uint8_t rows[16];
} __attribute__((aligned(64))) Layout;

/* The registers and their layout are read and written behind the compiler's back: GCC 12 knows but 8 bytes of it. */
INLINE void all_in_memory(void) { __asm__ volatile("" : : : "memory"); }

/* Linux lets a process that asked use the registers, from then on. */
int has_amx(void) {
  const long ask = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
  return !syscall(SYS_arch_prctl, ask, tile_data);
}

/* The thread's layout before is kept for `amx_ends`: others who use the registers may count on theirs. */
static void amx_begins(Layout *before) {
  Layout ours = {.palette = 1};
  for (int i = 0; i < 8; i++) ours.bytes[i] = 64, ours.rows[i] = 16;
  _tile_storeconfig(before);
  __asm__ volatile("" : : "r"(&ours), "r"(before) : "memory");
  _tile_loadconfig(&ours);
}

static void amx_ends(const Layout *before) {
  all_in_memory();
  _tile_loadconfig(before);
}

/* A product; the left factor or the right one may be a sum of two. */
typedef struct {
  const pair *left, *left_rest; /* the second is NULL where there is none */
  long left_stride;             /* in pairs */
  const pair *right, *right_rest;
  long right_stride, depth; /* in pairs; depth is a multiple of 16 */
} Product;

/* ROWS rows, and 32 or 16 columns. */
INLINE void amx_block(const int two, const Product *p, int count, float *to, long stride, int add, long column) {
  float *at = to + column, *below = at + 16 * stride;
  const long step = sizeof(float) * stride;
  if (add) {
    _tile_loadd(0, at, step);
    _tile_loadd(1, below, step);
    if (two) _tile_loadd(2, at + 16, step);
    if (two) _tile_loadd(3, below + 16, step);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < count; i++) {
    const long left_step = sizeof(pair) * p[i].left_stride, down = 16 * p[i].left_stride;
    const long right_step = sizeof(pair) * p[i].right_stride;
    for (long k = 0; k < p[i].depth; k += 16) {
      const pair *left = p[i].left + k, *right = p[i].right + k * p[i].right_stride + column;
      _tile_loadd(4, left, left_step);
      _tile_loadd(6, right, right_step);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, left + down, left_step);
      _tile_dpbf16ps(1, 5, 6);
      if (two) {
        _tile_loadd(7, right + 16, right_step);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      if (p[i].right_rest) {
        right = p[i].right_rest + k * p[i].right_stride + column;
        _tile_loadd(6, right, right_step);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (two) {
          _tile_loadd(7, right + 16, right_step);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      } else if (p[i].left_rest) {
        left = p[i].left_rest + k;
        _tile_loadd(4, left, left_step);
        _tile_dpbf16ps(0, 4, 6);
        if (two) _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, left + down, left_step);
        _tile_dpbf16ps(1, 5, 6);
        if (two) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, at, step);
  _tile_stored(1, below, step);
  if (two) _tile_stored(2, at + 16, step);
  if (two) _tile_stored(3, below + 16, step);
}

/* ROWS rows of the sum of some products, columns a multiple of 16, written or added to `to`. */
static void amx_rows(const Product *p, int count, float *to, long stride, int add, long columns) {
  all_in_memory();
  for (long column = 0; column < columns; column += 32) {
    if (columns - column > 16) amx_block(1, p, count, to, stride, add, column);
    else amx_block(0, p, count, to, stride, add, column);
  }
  all_in_memory();
}

/* Rounded: 16 of them, or 32, 0 where `take` has a 0. */
INLINE void put_16(void *to, vec x) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  memcpy(to, &rounded, sizeof rounded);
}

INLINE void put_32(void *to, vec first, vec second, __mmask32 take) {
  const __m512bh rounded = _mm512_maskz_cvtne2ps_pbh(take, (__m512)second, (__m512)first);
  memcpy(to, &rounded, sizeof rounded);
}

/* Rows [from, to) of float32, [T] each, of which row i ends with column i -> a left factor, [T / 2] each. */
static void lower_to_left(const float *rows, long from, long to, pair *left) {
  for (long r = from; r < to; r++, rows += T, left += T / 2) {
    for (long c = 0; c < to; c += 32) {
      const long some = r - c + 1;
      const __mmask32 take = some >= 32 ? 0xffffffff : some <= 0 ? 0 : (1u << some) - 1;
      put_32(left + c / 2, load(rows + c), load(rows + c + 16), take);
    }
  }
}

/* Two rows as pairs. */
INLINE void put_side_by_side(pair *to, vec even, vec odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const __m512i by_column = _mm512_permutexvar_epi16(order, (__m512i)both);
  memcpy(to, &by_column, sizeof by_column);
}

/* Rows [rows][columns] of float32 -> a right factor [rows / 2][columns] as the sum of two: the upper halves of the
   numbers, and what these are short of. */
static void to_right(const float *from, long rows, long columns, pair *to, pair *rest) {
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  for (long r = 0; r < rows; r += 2, from += 2 * columns, to += columns, rest += columns) {
    for (long c = 0; c < columns; c += 16) {
      const vec even = load(from + c), odd = load(from + columns + c);
      const __m512i even_most = (__m512i)even & upper, odd_most = (__m512i)odd & upper;
      const __m512i most = _mm512_or_si512(_mm512_srli_epi32(even_most, 16), odd_most);
      memcpy(to + c, &most, sizeof most);
      put_side_by_side(rest + c, even - (vec)even_most, odd - (vec)odd_most);
    }
  }
}

/* Rows [T][columns] of bfloat16 -> a right factor [T / 2][columns + 16], with a first column of 1 in what is added. */
static void to_right_with_ones(const uint16_t *from, long columns, pair *to) {
  const long wide = columns + 16;
  for (long r = 0; r < T; r += 2) {
    pair *row = to + r / 2 * wide;
    for (long c = 0; c < columns; c += 16) {
      __m256i low, high;
      memcpy(&low, from + r * columns + c, sizeof low);
      memcpy(&high, from + (r + 1) * columns + c, sizeof high);
      const __m512i even = _mm512_cvtepu16_epi32(low), odd = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
      const __m512i both = _mm512_or_si512(even, odd);
      memcpy(row + c, &both, sizeof both);
    }
    memset(row + columns, 0, sizeof(pair) * 16);
    row[columns] = 0x3f803f80;
  }
}
#else
int has_amx(void) { return 0; }
#endif
