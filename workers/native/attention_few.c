// Attention of up to FEW_ROWS rows to a span of keys (see attention.c), with a key in each lane of a register: what a
// decode does, which would leave most lanes of many rows empty.
#include "attention.h"

// For scores tiles 0 and 1 are results, 2 queries and 3 keys.
static inline void shape_for_scores(int rows) {
    const int tile_rows[8] = {KEYS, KEYS, KEYS, KEYS, 0, 0, 0, 0};
    const int bytes[8] = {rows * 4, rows * 4, rows * 4, 64, 0, 0, 0, 0};
    set_shapes(tile_rows, bytes);
}

// For values 0 to 3 are results, 4 weights and 5 to 7 values.
static inline void shape_for_values(int rows) {
    const int tile_rows[8] = {rows, rows, rows, rows, rows, TILE_ROWS, TILE_ROWS, TILE_ROWS};
    const int bytes[8] = {64, 64, 64, 64, 64, 64, 64, 64};
    set_shapes(tile_rows, bytes);
}

// scores (rows, SPAN) = Q K^T, -inf where a key comes after a row; the largest of each row.
static void score_few(const Batch *b, const Scratch *s, int64_t rows, int64_t start, int64_t keys, __m512 *highest) {
    int64_t dim = b->dim, sure = s->positions[0] + 1 - start;  // keys that no row comes before
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i apart = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int32_t)rows));
    float *parts = s->scores + FEW_ROWS * SPAN;  // (keys, rows)
    shape_for_scores((int)rows);
    for (int64_t key = 0; key < keys; key += 32) {
        const bf16 *k = s->key_groups[key / KEYS], *later = s->key_groups[key / KEYS + 1];
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < dim; d += 32) {
            _tile_loadd(2, s->queries + d * 16, 64);
            _tile_loadd(3, k + d, dim * 2);
            _tile_dpbf16ps(0, 3, 2);
            _tile_loadd(3, later + d, dim * 2);
            _tile_dpbf16ps(1, 3, 2);
        }
        _tile_stored(0, parts + key * rows, rows * 4);
        _tile_stored(1, parts + (key + KEYS) * rows, rows * 4);
    }
    for (int64_t row = 0; row < rows; row++) highest[row] = _mm512_set1_ps(-__builtin_inff());
    for (int64_t key = 0; key < keys; key += KEYS)
        for (int64_t row = 0; row < rows; row++) {
            __m512 value = _mm512_i32gather_ps(apart, parts + key * rows + row, 4);
            if (key + KEYS > sure) {
                __m512i number = _mm512_add_epi32(lanes, _mm512_set1_epi32((int32_t)(start + key)));
                __mmask16 after = _mm512_cmpgt_epi32_mask(number, _mm512_set1_epi32(s->positions[row]));
                value = _mm512_mask_mov_ps(value, after, _mm512_set1_ps(-__builtin_inff()));
            }
            _mm512_storeu_ps(s->scores + row * SPAN + key, value);
            highest[row] = _mm512_max_ps(highest[row], value);
        }
}

static inline __m512 sum_neighbours(__m512 x) {  // of 2, then 4, 8 and 16 lanes, into all of them
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xB1));
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4E));
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xB1));
    return _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4E));
}

// out (rows, dim) = out * factors + sums of a tile of dims.
static inline void add_tile(const Scratch *s, int64_t d, int64_t dim, const float *sums, const float *factors,
                            int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
        float *to = s->out + i * dim + d * 16;
        __m512 total = _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(factors[i]), _mm512_load_ps(sums + i * 16));
        _mm512_storeu_ps(to, total);
    }
}

// One span for up to FEW_ROWS rows.
void nano_attend_few(const Batch *b, const Scratch *s, int64_t rows, int64_t start, int64_t end) {
    int64_t dim = b->dim, dim_tiles = dim / 16, keys = (end - start + 31) / 32 * 32;
    const __m512 scale = _mm512_set1_ps(b->scale);
    __m512 largest[FEW_ROWS];
    float factors[FEW_ROWS], sums[FEW_ROWS * 16] __attribute__((aligned(64)));
    score_few(b, s, rows, start, keys, largest);
    for (int64_t row = 0; row < rows; row++) {
        const float *from = s->scores + row * SPAN;
        __m512 before = _mm512_set1_ps(s->highest[row]);
        __m512 highest = _mm512_max_ps(before, _mm512_set1_ps(_mm512_reduce_max_ps(largest[row])));
        __m512 scaled = _mm512_mul_ps(highest, scale), sum = _mm512_setzero_ps();
        __m512 decay = power_of_2(_mm512_sub_ps(_mm512_mul_ps(before, scale), scaled));
        for (int64_t key = 0; key < keys; key += 32) {
            __m512 left = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(from + key), scale, scaled));
            __m512 right = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(from + key + 16), scale, scaled));
            sum = _mm512_add_ps(sum, _mm512_add_ps(sum_neighbours(left), sum_neighbours(right)));
            _mm256_storeu_si256((void *)(s->weights + key * 16 + row * 32), narrow(left));
            _mm256_storeu_si256((void *)(s->weights + key * 16 + row * 32 + 16), narrow(right));
        }
        sum = _mm512_fmadd_ps(_mm512_set1_ps(s->sums[row]), decay, sum);
        s->highest[row] = _mm512_cvtss_f32(highest);
        s->sums[row] = _mm512_cvtss_f32(sum);
        factors[row] = _mm512_cvtss_f32(decay);
    }
    shape_for_values((int)rows);
    for (int64_t d = 0; d < dim_tiles; d += 4) {
        int is_wide = d + 2 < dim_tiles;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t key = 0; key < keys; key += 32) {
            const bf16 *v = s->values;
            pack_values(s, s->values, key, end - start, d * 16, is_wide ? 64 : 32, dim);
            _tile_loadd(4, s->weights + key * 16, 64);
            _tile_loadd(5, v, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, v + TILE, 64);
            _tile_dpbf16ps(1, 4, 6);
            if (!is_wide) continue;
            _tile_loadd(7, v + 2 * TILE, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, v + 3 * TILE, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, sums, 64);
        add_tile(s, d, dim, sums, factors, rows);
        _tile_stored(1, sums, 64);
        add_tile(s, d + 1, dim, sums, factors, rows);
        if (!is_wide) continue;
        _tile_stored(2, sums, 64);
        add_tile(s, d + 2, dim, sums, factors, rows);
        _tile_stored(3, sums, 64);
        add_tile(s, d + 3, dim, sums, factors, rows);
    }
}

void nano_put_few(const Batch *b, const Scratch *s, int64_t seq, int64_t head, int64_t first_row, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
        __m512 scale = _mm512_set1_ps(1.0f / s->sums[i]);
        for (int64_t d = 0; d < b->dim; d += 32) {
            const float *from = s->out + i * b->dim + d;
            put(b, seq, head, first_row + i, d, _mm512_mul_ps(_mm512_loadu_ps(from), scale),
                _mm512_mul_ps(_mm512_loadu_ps(from + 16), scale));
        }
    }
}
