// What the kernels share: bfloat16 in AVX-512 registers, AMX tiles, and who computes what. Knows no tensor.
#ifndef NANOENGINE_COMMON_H
#define NANOENGINE_COMMON_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;  // the upper half of a float

enum { TILE_ROWS = 16, TILE_K = 32, TILE = TILE_ROWS * TILE_K };  // of bfloat16; a tile is 1 KiB

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline __m512 load_wide(const bf16 *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16));
}

static inline __m512 load_wide_some(const bf16 *from, __mmask16 which) {
    __m256i narrow = _mm256_maskz_loadu_epi16(which, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

// Rounds to the nearest, ties to even.
static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline __m512 rounded(__m512 x) {  // to bfloat16 and back
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(x)), 16));
}

static inline __mmask16 first(int64_t count) { return count >= 16 ? 0xFFFF : (__mmask16)((1u << count) - 1); }

// 2^x for x <= 128, relative error below 2e-7 and 2^0 = 1; 0 below -126. 2^n * 2^r, |r| <= 1/2, by a polynomial.
static inline __m512 power_of_2(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    __m512 sum = _mm512_set1_ps(0.001326472731307149f);
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.009671512991189957f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.05550733581185341f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.24022242426872253f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.6931470036506653f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), sum, n);
}

static inline void transpose(__m512i r[16]) {  // 16 x 16 of 32 bits
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xDD);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xDD);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xDD);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xDD);
    }
}

static inline void set_shapes(const int rows[8], const int bytes_per_row[8]) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes_per_row[16];
        uint8_t rows[16];
    } shape;
    memset(&shape, 0, sizeof shape);
    shape.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        shape.bytes_per_row[tile] = rows[tile] ? (uint16_t)bytes_per_row[tile] : 0;
        shape.rows[tile] = (uint8_t)rows[tile];
    }
    __asm__ volatile("" : : "r"(&shape) : "memory");  // GCC 12 thinks that only the first 8 bytes are read
    _tile_loadconfig(&shape);
}

// Tiles 0 to 3 are results (0 and 1 of the upper rows, 2 and 3 of the lower), 4 and 5 left operands, 6 and 7 right.
static inline void shape_tiles(int upper_rows, int lower_rows) {
    const int rows[8] = {upper_rows, upper_rows, lower_rows, lower_rows, upper_rows, lower_rows, TILE_ROWS, TILE_ROWS};
    const int bytes[8] = {64, 64, 64, 64, 64, 64, 64, 64};
    set_shapes(rows, bytes);
}

enum { NARROW, WIDE, SWIGLU };  // what a linear writes: bfloat16, float32, or silu(gate) * up in bfloat16

// Rows that nothing but a linear reads lie in the tiles that it loads, (rows / 16, size / 32, 16, 32), and there are
// places for an even number of tiles of rows: a tile of rows that are far apart is loaded more slowly. size % 32 == 0.
static inline int64_t place_in_tiles(int64_t row, int64_t column, int64_t size) {
    return (row / TILE_ROWS * (size / TILE_K) + column / TILE_K) * TILE + row % TILE_ROWS * TILE_K + column % TILE_K;
}

enum { PLAIN, IN_TILES };

#define LOG2_E 1.44269504f

typedef struct {  // of ranks that share memory; workers/native/group.py fills it in
    int64_t *flags;  // words_per_rank apart; a rank's first word is the exchange that it has reached
    char *slots;     // two buffers of slot_bytes a rank
    int64_t rank, world_size, words_per_rank, slot_bytes, count, next_generation, spin_ns;
    int (*wait)(int64_t rank, int64_t count);  // patiently; anything but 0 when the step is over
} Group;

int nano_all_reduce(Group *g, bf16 *x, int64_t numel, int threads);
void nano_add_rms_norm(bf16 *x, const bf16 *residual, const bf16 *weight, bf16 *out, int64_t rows, int64_t size,
                       float eps, int layout, int threads);
void nano_linear(const bf16 *x, const bf16 *packed, const bf16 *bias, void *out, int64_t m, int64_t n, int64_t k,
                 int64_t x_stride, int64_t out_stride, int kind, int layout, int threads);
void nano_norm_rotate(bf16 *x, const bf16 *weight, const float *cos, const float *sin, int64_t tokens, int64_t heads,
                      int64_t dim, int64_t stride, int64_t angle_stride, float eps, int threads);
void nano_store(const bf16 *k, const bf16 *v, const int64_t *slots, bf16 *cache, int64_t tokens, int64_t heads,
                int64_t dim, int64_t block_size, int64_t k_stride, int64_t v_stride, int threads);
void nano_attention(const bf16 *q, const bf16 *cache, bf16 *out, const int64_t *items, int64_t num_items,
                    const int64_t *tables, int64_t table_stride, const int64_t *starts, const int64_t *query_lens,
                    const int64_t *seq_lens, int64_t block_size, int64_t group, int64_t kv_heads, int64_t dim,
                    int64_t q_stride, float scale, int layout, char *scratch, int threads);

#endif
