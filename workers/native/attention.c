// Causal attention over a paged cache in AMX tiles. Knows no sequence but by its block table and lengths.
//
// The rows of a query block are (token, member of the group of heads that share a K/V head), 16 a tile. Keys are taken
// in spans that begin at multiples of SPAN, each copied out of the cache once for all tiles of the block. Per span:
// scores = K Q^T, a column a row of the block; exp; V weighted by it; then what the spans before gave is rescaled to the
// larger maximum. All of that is fixed by a row's own position, whatever rows stand beside it and however a prompt is
// cut into chunks: keys after it have the weight 0, which adds nothing. Who computes a block makes no difference either.
#include "common.h"

enum { SPAN = 1024, BLOCK_TILES = 16, AHEAD = 16 };

typedef struct {
    const bf16 *q, *cache;
    bf16 *out;
    const int64_t *tables, *starts, *query_lens, *seq_lens;  // starts: a sequence's first row of q
    int64_t table_stride, block_size, group, kv_heads, dim, q_stride;
    float scale;
} Batch;

typedef struct {  // one thread's, see nano_attention_scratch
    bf16 *keys, *values, *queries, *weights;
    float *scores, *out, *highest, *sums;
    int32_t *positions;
} Scratch;

int64_t nano_attention_scratch(int64_t dim) {  // bytes for each thread
    int64_t rows = BLOCK_TILES * 16;
    return SPAN * dim * 2 * 2 + rows * dim * 2 + SPAN * 16 * 2 + SPAN * 16 * 4 + rows * dim * 4 + rows * 4 * 3 + 4096;
}

static Scratch divide(char *from, int64_t dim) {
    int64_t rows = BLOCK_TILES * 16;
    Scratch s;
    s.keys = (bf16 *)from;                       // (SPAN, dim)
    s.values = s.keys + SPAN * dim;              // (SPAN / 32, dim / 16) tiles of key pairs by dims
    s.queries = s.values + SPAN * dim;           // (tiles, dim / 32) tiles of dim pairs by rows
    s.weights = s.queries + rows * dim;          // (SPAN / 32) tiles of rows by keys
    s.scores = (float *)(s.weights + SPAN * 16); // (SPAN, 16)
    s.out = s.scores + SPAN * 16;                // (rows, dim)
    s.highest = s.out + rows * dim;              // (rows)
    s.sums = s.highest + rows;                   // (rows)
    s.positions = (int32_t *)(s.sums + rows);    // (rows)
    return s;
}

static inline __m512i pairs(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Where the key of a position lies; its value lies kv_heads * dim behind.
static inline const bf16 *slot_of(const Batch *b, int64_t seq, int64_t head, int64_t position) {
    uint32_t block_size = (uint32_t)b->block_size, at = (uint32_t)position;
    int64_t slot = b->tables[seq * b->table_stride + at / block_size] * b->block_size + at % block_size;
    return b->cache + (slot * 2 * b->kv_heads + head) * b->dim;
}

// A head's keys lie too far apart for the processor to see them coming.
static inline void fetch(const Batch *b, int64_t seq, int64_t head, int64_t position) {
    const bf16 *slot = slot_of(b, seq, head, position), *value = slot + b->kv_heads * b->dim;
    for (int64_t d = 0; d < b->dim; d += 32) {
        _mm_prefetch((const char *)(slot + d), _MM_HINT_T0);
        _mm_prefetch((const char *)(value + d), _MM_HINT_T0);
    }
}

// Copy the keys and values of positions start .. end - 1 of one head, zeros up to a multiple of 32: nobody knows what
// the slots after them hold.
static void gather(const Batch *b, const Scratch *s, int64_t seq, int64_t head, int64_t start, int64_t end) {
    int64_t dim = b->dim, dim_tiles = dim / 16;
    static const bf16 zeros[1024];
    for (int64_t position = start; position < start + AHEAD && position < end; position++) fetch(b, seq, head, position);
    for (int64_t position = start; position < end; position += 2) {
        if (position + AHEAD + 1 < end) {
            fetch(b, seq, head, position + AHEAD);
            fetch(b, seq, head, position + AHEAD + 1);
        }
        const bf16 *v[2] = {zeros, zeros};
        for (int64_t i = 0; i < 2; i++) {
            bf16 *key = s->keys + (position + i - start) * dim;
            if (position + i >= end) {
                memset(key, 0, (size_t)dim * sizeof(bf16));
                continue;
            }
            const bf16 *slot = slot_of(b, seq, head, position + i);
            for (int64_t d = 0; d < dim; d += 32) _mm512_storeu_si512(key + d, _mm512_loadu_si512(slot + d));
            v[i] = slot + b->kv_heads * dim;
        }
        int64_t pair = (position - start) / 2;
        bf16 *to = s->values + pair / 16 * dim_tiles * TILE + pair % 16 * 32;
        for (int64_t d = 0; d < dim; d += 16)
            _mm512_storeu_si512(to + d / 16 * TILE, pairs(_mm256_loadu_si256((const void *)(v[0] + d)),
                                                          _mm256_loadu_si256((const void *)(v[1] + d))));
    }
    for (int64_t pair = (end - start + 1) / 2; pair % 16; pair++)
        for (int64_t tile = 0; tile < dim_tiles; tile++)
            memset(s->values + (pair / 16 * dim_tiles + tile) * TILE + pair % 16 * 32, 0, 64);
    for (int64_t key = (end - start + 1) / 2 * 2; key % 32; key++)
        memset(s->keys + key * dim, 0, (size_t)dim * sizeof(bf16));
}

// Lay out up to 16 rows from first_row on as a right operand; rows that only fill up the tile repeat the last position.
static void load_queries(const Batch *b, const Scratch *s, int64_t tile, int64_t seq, int64_t head, int64_t first_row,
                         int64_t rows) {
    int64_t dim = b->dim, before = b->seq_lens[seq] - b->query_lens[seq];
    uint32_t *to = (uint32_t *)(s->queries + tile * 16 * dim);
    memset(to, 0, (size_t)(16 * dim) * sizeof(bf16));
    for (int64_t i = 0; i < 16; i++) {
        int64_t row = first_row + (i < rows ? i : rows - 1), token = row / b->group;
        s->positions[tile * 16 + i] = (int32_t)(before + token);
        if (i >= rows) continue;
        const bf16 *from = b->q + (b->starts[seq] + token) * b->q_stride + (head * b->group + row % b->group) * dim;
        for (int64_t d = 0; d < dim / 2; d++) memcpy(to + d * 16 + i, from + 2 * d, 4);
    }
    _mm512_storeu_ps(s->highest + tile * 16, _mm512_set1_ps(-__builtin_inff()));
    _mm512_storeu_ps(s->sums + tile * 16, _mm512_setzero_ps());
    memset(s->out + tile * 16 * dim, 0, (size_t)(16 * dim) * sizeof(float));
}

// scores (keys, 16) = K Q^T * scale, -inf where a key comes after a row; returns the largest of each row.
static __m512 score(const Batch *b, const Scratch *s, int64_t tile, int64_t start, int64_t keys) {
    int64_t dim = b->dim;
    const bf16 *queries = s->queries + tile * 16 * dim;
    __m512i position = _mm512_loadu_si512(s->positions + tile * 16);
    int64_t sure = s->positions[tile * 16] + 1 - start;  // keys that no row comes before
    __m512 highest = _mm512_set1_ps(-__builtin_inff()), scale = _mm512_set1_ps(b->scale);
    for (int64_t key = 0; key < keys; key += 32) {
        const bf16 *k = s->keys + key * dim;
        float *to = s->scores + key * 16;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < dim; d += 32) {
            _tile_loadd(6, queries + d * 16, 64);
            _tile_loadd(4, k + d, dim * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, k + 16 * dim + d, dim * 2);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, to, 64);
        _tile_stored(1, to + 256, 64);
        for (int64_t i = 0; i < 32; i++) {
            __m512 value = _mm512_mul_ps(_mm512_loadu_ps(to + i * 16), scale);
            if (key + i >= sure) {
                __mmask16 after = _mm512_cmplt_epi32_mask(position, _mm512_set1_epi32((int32_t)(start + key + i)));
                value = _mm512_mask_mov_ps(value, after, _mm512_set1_ps(-__builtin_inff()));
            }
            _mm512_storeu_ps(to + i * 16, value);
            highest = _mm512_max_ps(highest, value);
        }
    }
    return highest;
}

// One span for one tile of rows.
static void attend(const Batch *b, const Scratch *s, int64_t tile, int64_t start, int64_t keys) {
    int64_t dim = b->dim, dim_tiles = dim / 16;
    __m512 before = _mm512_loadu_ps(s->highest + tile * 16);
    __m512 highest = _mm512_max_ps(before, score(b, s, tile, start, keys));
    __m512 decay = exponential(_mm512_sub_ps(before, highest)), sum = _mm512_setzero_ps();
    for (int64_t key = 0; key < keys; key += 32) {
        __m512i both[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const float *from = s->scores + (key + 2 * i) * 16;
            __m512 even = exponential(_mm512_sub_ps(_mm512_loadu_ps(from), highest));
            __m512 odd = exponential(_mm512_sub_ps(_mm512_loadu_ps(from + 16), highest));
            sum = _mm512_add_ps(sum, even);
            sum = _mm512_add_ps(sum, odd);
            both[i] = pairs(narrow(even), narrow(odd));
        }
        transpose(both);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(s->weights + key * 16 + i * 32, both[i]);
    }
    float factors[16], sums[256] __attribute__((aligned(64)));
    _mm512_storeu_ps(factors, decay);
    _mm512_storeu_ps(s->highest + tile * 16, highest);
    _mm512_storeu_ps(s->sums + tile * 16, _mm512_fmadd_ps(_mm512_loadu_ps(s->sums + tile * 16), decay, sum));
    for (int64_t d = 0; d < dim_tiles; d += 2) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t key = 0; key < keys; key += 32) {
            const bf16 *v = s->values + (key / 32 * dim_tiles + d) * TILE;
            _tile_loadd(4, s->weights + key * 16, 64);
            _tile_loadd(6, v, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, v + TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        for (int64_t side = 0; side < 2; side++) {
            if (side == 0) _tile_stored(0, sums, 64);
            if (side == 1) _tile_stored(1, sums, 64);
            for (int i = 0; i < 16; i++) {
                float *to = s->out + (tile * 16 + i) * dim + (d + side) * 16;
                __m512 total = _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(factors[i]), _mm512_load_ps(sums + i * 16));
                _mm512_storeu_ps(to, total);
            }
        }
    }
}

// Rows first_row .. of one sequence and K/V head, at most a block of them.
static void attend_block(const Batch *b, const Scratch *s, int64_t seq, int64_t head, int64_t first_row) {
    int64_t dim = b->dim, rows = least(b->query_lens[seq] * b->group - first_row, BLOCK_TILES * 16);
    int64_t tiles = (rows + 15) / 16;
    for (int64_t tile = 0; tile < tiles; tile++)
        load_queries(b, s, tile, seq, head, first_row + tile * 16, least(16, rows - tile * 16));
    int64_t end = s->positions[tiles * 16 - 1] + 1;
    for (int64_t start = 0; start < end; start += SPAN) {
        gather(b, s, seq, head, start, least(end, start + SPAN));
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t keys = least(s->positions[tile * 16 + 15] + 1 - start, SPAN);
            if (keys > 0) attend(b, s, tile, start, (keys + 31) / 32 * 32);
        }
    }
    for (int64_t i = 0; i < rows; i++) {
        int64_t token = (first_row + i) / b->group, member = (first_row + i) % b->group;
        bf16 *to = b->out + ((b->starts[seq] + token) * b->kv_heads * b->group + head * b->group + member) * dim;
        __m512 scale = _mm512_set1_ps(1.0f / s->sums[i]);
        for (int64_t d = 0; d < dim; d += 16) {
            // Adding 0 makes a 0 of -0: which of the two it is may depend on how many keys of weight 0 there were.
            __m512 value = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(s->out + i * dim + d), scale), _mm512_setzero_ps());
            _mm256_storeu_si256((void *)(to + d), narrow(value));
        }
    }
}

// q (tokens, heads, dim), tokens q_stride apart -> out (tokens, heads, dim). `items` are (sequence, K/V head, first row)
// of the blocks, 256 rows each but the last of a sequence; dim % 32 == 0 and at most 1024.
void nano_attention(const bf16 *q, const bf16 *cache, bf16 *out, const int64_t *items, int64_t num_items,
                    const int64_t *tables, int64_t table_stride, const int64_t *starts, const int64_t *query_lens,
                    const int64_t *seq_lens, int64_t block_size, int64_t group, int64_t kv_heads, int64_t dim,
                    int64_t q_stride, float scale, char *scratch, int threads) {
    const Batch batch = {q,     cache,      out,   tables,   starts, query_lens, seq_lens, table_stride,
                         block_size, group, kv_heads, dim,   q_stride,   scale};
    int64_t next = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        const Scratch own = divide(scratch + thread * nano_attention_scratch(dim), dim);
        shape_tiles(16, 16);
        for (;;) {
            int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (item >= num_items) break;
            attend_block(&batch, &own, items[3 * item], items[3 * item + 1], items[3 * item + 2]);
        }
        _tile_release();
    }
}
