// What the parts of attention share: a batch, a thread's memory, the layout of values, and how results are written.
#ifndef NANOENGINE_ATTENTION_H
#define NANOENGINE_ATTENTION_H

#include "common.h"

enum { SPAN = 1024, BLOCK_ROWS = 512, PAIR = 32, KEYS = 16, FEW_ROWS = 16, LARGEST_DIM = 1024 };

typedef struct {
    const bf16 *q, *cache;
    bf16 *out;
    const int64_t *tables, *starts, *query_lens, *seq_lens;  // starts: a sequence's first row of q
    int64_t table_stride, block_size, group, kv_heads, dim, q_stride;
    float scale;  // of a score, to the power of 2
    int layout;  // of out
} Batch;

typedef struct {  // one thread's, see nano_attention_scratch
    const bf16 **key_groups, **value_groups;
    bf16 *copies, *values, *queries, *weights;
    float *scores, *out, *highest, *sums;
    int32_t *positions;
} Scratch;

// Lay out `dims` (a multiple of 32) of 32 values from number `start` of a span on in tiles of key pairs. Of 32 dims the
// first tile has 0 to 3, 8 to 11 and so on, the second the others: they stay in their quarter of a register. Values
// after `end` are 0: nobody knows what their slots hold.
static inline void pack_values(const Scratch *s, bf16 *to, int64_t start, int64_t end, int64_t first_dim, int64_t dims,
                               int64_t dim) {
    for (int64_t pair = 0; pair < 16; pair++, to += 32) {
        int64_t key = start + 2 * pair;
        const bf16 *from = s->value_groups[key / KEYS] + key % KEYS * dim + first_dim;
        __mmask32 even = key < end ? ~0u : 0, odd = key + 1 < end ? ~0u : 0;
        for (int64_t d = 0; d < dims; d += 32) {
            __m512i a = _mm512_maskz_loadu_epi16(even, from + d), b = _mm512_maskz_loadu_epi16(odd, from + dim + d);
            _mm512_storeu_si512(to + d / 16 * TILE, _mm512_unpacklo_epi16(a, b));
            _mm512_storeu_si512(to + (d / 16 + 1) * TILE, _mm512_unpackhi_epi16(a, b));
        }
    }
}

// Write 32 dims of a row, given in the order of `values` and multiplied by scale.
static inline void put(const Batch *b, int64_t seq, int64_t head, int64_t row, int64_t d, __m512 first, __m512 second) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    int64_t token = b->starts[seq] + row / b->group, column = (head * b->group + row % b->group) * b->dim + d;
    int64_t size = b->kv_heads * b->group * b->dim;
    bf16 *to = b->out + (b->layout == IN_TILES ? place_in_tiles(token, column, size) : token * size + column);
    // Adding 0 makes a 0 of -0: which of the two it is may depend on how many keys of weight 0 there were.
    first = _mm512_add_ps(first, _mm512_setzero_ps());
    second = _mm512_add_ps(second, _mm512_setzero_ps());
    _mm256_storeu_si256((void *)to, narrow(_mm512_permutex2var_ps(first, low, second)));
    _mm256_storeu_si256((void *)(to + 16), narrow(_mm512_permutex2var_ps(first, high, second)));
}

// Adds what a span says to the results of a block of rows.
void nano_attend_few(const Batch *b, const Scratch *s, int64_t rows, int64_t start, int64_t end);
void nano_attend_many(const Batch *b, const Scratch *s, int64_t rows, int64_t start, int64_t end);

// Divide the rows of a block by their sums and write them.
void nano_put_few(const Batch *b, const Scratch *s, int64_t seq, int64_t head, int64_t first_row, int64_t rows);
void nano_put_many(const Batch *b, const Scratch *s, int64_t seq, int64_t head, int64_t first_row, int64_t rows);

#endif
