// Causal attention over a paged cache in AMX tiles. Knows no sequence but by its block table and lengths.
//
// The cache is (block, key or value, K/V head, token, dim). The rows of a query block are (token, member of the group of
// heads that share a K/V head). Keys are taken in spans that begin at multiples of SPAN. Per span: scores = K Q^T, 2 to
// the power of what they are below the largest one, V weighted by it, and what the spans before gave is rescaled to the
// larger maximum. Of many rows 32 are taken at a time, with a row in each lane of a register; few, as those of a decode,
// lie in as few columns of a tile, and each lane has a key. Both add in the same order: products 32 at a time by the
// tiles, weights of 32 keys as a tree of neighbours, then those sums one after the other. So all bits are fixed by a
// row's own position, whatever rows stand beside it and however a prompt is cut into chunks: keys after it have the
// weight 0, which adds nothing. Who computes a block makes no difference either.
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

int64_t nano_attention_scratch(int64_t dim) {  // bytes for each thread
    int64_t bytes = SPAN / KEYS * 8 * 2 + SPAN * dim * 2 * 3 + BLOCK_ROWS * dim * 2 + SPAN * PAIR * 2;
    return bytes + SPAN * PAIR * 4 + BLOCK_ROWS * dim * 4 + BLOCK_ROWS * 4 * 3 + 4096;
}

static Scratch divide(char *from, int64_t dim) {
    Scratch s;
    s.key_groups = (const bf16 **)from;              // (SPAN / KEYS) places of KEYS keys, dim apart
    s.value_groups = s.key_groups + SPAN / KEYS;     // the same of values
    s.copies = (bf16 *)(s.value_groups + SPAN / KEYS);  // (2, SPAN, dim) of groups that lie in several pieces
    s.values = s.copies + 2 * SPAN * dim;            // (SPAN / 32, dim / 16) tiles of dims by keys, or of key pairs by dims
    s.queries = s.values + SPAN * dim;               // (pairs, 2, dim / 32) tiles of dim pairs by rows
    s.weights = s.queries + BLOCK_ROWS * dim;        // (SPAN / 32, 2) tiles of key pairs by rows, or of rows by keys
    s.scores = (float *)(s.weights + SPAN * PAIR);   // (SPAN, PAIR), or (rows, SPAN) and parts of it
    s.out = s.scores + SPAN * PAIR;                  // (pairs, dim, PAIR), or (rows, dim); dims as in `values`
    s.highest = s.out + BLOCK_ROWS * dim;            // (rows)
    s.sums = s.highest + BLOCK_ROWS;                 // (rows)
    s.positions = (int32_t *)(s.sums + BLOCK_ROWS);  // (rows)
    return s;
}

// Where the key of a position lies; its value lies kv_heads * block_size * dim behind.
static inline const bf16 *slot_of(const Batch *b, int64_t seq, int64_t head, int64_t position) {
    uint32_t block_size = (uint32_t)b->block_size, at = (uint32_t)position;
    int64_t block = b->tables[seq * b->table_stride + at / block_size];
    return b->cache + ((block * 2 * b->kv_heads + head) * b->block_size + at % block_size) * b->dim;
}

// Find the keys and values of positions start .. end - 1 of one head, KEYS at a time and an even number of times. What
// stands behind the last one may be anything.
static void find(const Batch *b, const Scratch *s, int64_t seq, int64_t head, int64_t start, int64_t end) {
    static const bf16 nothing[KEYS * LARGEST_DIM];
    int64_t dim = b->dim, to_value = b->kv_heads * b->block_size * dim;
    for (int64_t at = start, group = 0; at < end || group % 2; at += KEYS, group++) {
        const bf16 *keys = nothing, *values = nothing;
        if (at < end && b->block_size % KEYS == 0) {
            keys = slot_of(b, seq, head, at);
            values = keys + to_value;
        } else if (at < end) {
            bf16 *key = s->copies + group * KEYS * dim, *value = key + SPAN * dim;
            keys = key;
            values = value;
            for (int64_t i = at; i < end && i < at + KEYS; i++, key += dim, value += dim) {
                const bf16 *slot = slot_of(b, seq, head, i);
                memcpy(key, slot, (size_t)dim * sizeof(bf16));
                memcpy(value, slot + to_value, (size_t)dim * sizeof(bf16));
            }
        }
        s->key_groups[group] = keys;
        s->value_groups[group] = values;
    }
}

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

// Lay out `dims` of 32 values as tiles of dims by keys, in the same order of dims.
static void transpose_values(const Scratch *s, int64_t start, int64_t end, int64_t dim) {
    bf16 *to = s->values + start * dim;
    for (int64_t d = 0; d < dim; d += 32, to += 2 * TILE) {
        pack_values(s, to, start, end, d, 32, dim);
        for (int half = 0; half < 2; half++) {
            __m512i tile[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) tile[i] = _mm512_loadu_si512(to + half * TILE + i * 32);
            transpose(tile);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + half * TILE + i * 32, tile[i]);
        }
    }
}

// Lay out up to 16 rows from first_row on as a right operand; rows that only fill up the tile repeat the last position.
static void load_queries(const Batch *b, const Scratch *s, int64_t tile, int64_t seq, int64_t head, int64_t first_row,
                         int64_t rows) {
    int64_t dim = b->dim, before = b->seq_lens[seq] - b->query_lens[seq];
    bf16 *to = s->queries + tile * 16 * dim;
    const bf16 *from[16];
    for (int64_t i = 0; i < 16; i++) {
        int64_t row = first_row + (i < rows ? i : rows - 1), token = row / b->group;
        s->positions[tile * 16 + i] = (int32_t)(before + token);
        from[i] = b->q + (b->starts[seq] + token) * b->q_stride + (head * b->group + row % b->group) * dim;
    }
    for (int64_t d = 0; d < dim; d += 32, to += TILE) {
        __m512i pairs[16];
        for (int64_t i = 0; i < 16; i++) pairs[i] = i < rows ? _mm512_loadu_si512(from[i] + d) : _mm512_setzero_si512();
        transpose(pairs);
        for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(to + i * 32, pairs[i]);
    }
    _mm512_storeu_ps(s->highest + tile * 16, _mm512_set1_ps(-__builtin_inff()));
    _mm512_storeu_ps(s->sums + tile * 16, _mm512_setzero_ps());
    memset(s->out + tile * 16 * dim, 0, (size_t)(16 * dim) * sizeof(float));
}

// -- a row in each lane --

// scores (32 keys, PAIR) = K Q^T.
static inline void score(const Batch *b, const Scratch *s, int64_t pair, int64_t key, int64_t next_key) {
    int64_t dim = b->dim;
    const bf16 *queries = s->queries + pair * PAIR * dim, *second = queries + 16 * dim;
    const bf16 *k = s->key_groups[key / KEYS], *later = s->key_groups[key / KEYS + 1];
    float *to = s->scores + key * PAIR;
    const bf16 *next = s->key_groups[next_key / KEYS], *next_later = s->key_groups[next_key / KEYS + 1];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < dim; d += 32) {
        for (int64_t line = 0; line < KEYS; line++) {
            _mm_prefetch((const char *)(next + d * KEYS + line * 32), _MM_HINT_T0);
            _mm_prefetch((const char *)(next_later + d * KEYS + line * 32), _MM_HINT_T0);
        }
        _tile_loadd(4, k + d, dim * 2);
        _tile_loadd(6, queries + d * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, later + d, dim * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, second + d * 16, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, PAIR * 4);
    _tile_stored(1, to + 16, PAIR * 4);
    _tile_stored(2, to + 16 * PAIR, PAIR * 4);
    _tile_stored(3, to + 16 * PAIR + 16, PAIR * 4);
}

// Make scores of 32 keys -inf where a key comes after a row, of which the first `sure` keys come after none; and keep
// the largest of each row.
static inline void find_largest(const Scratch *s, int64_t pair, int64_t start, int64_t key, int64_t sure,
                                __m512 largest[2]) {
    float *scores = s->scores + key * PAIR;
    for (int64_t i = 0; i < 32; i++)
        for (int half = 0; half < 2; half++) {
            float *at = scores + i * PAIR + half * 16;
            __m512 value = _mm512_loadu_ps(at);
            if (key + i >= sure) {
                __m512i position = _mm512_loadu_si512(s->positions + pair * PAIR + half * 16);
                __mmask16 after = _mm512_cmplt_epi32_mask(position, _mm512_set1_epi32((int32_t)(start + key + i)));
                value = _mm512_mask_mov_ps(value, after, _mm512_set1_ps(-__builtin_inff()));
                _mm512_storeu_ps(at, value);
            }
            largest[half] = _mm512_max_ps(largest[half], value);
        }
}

// weights = 2 to the power of scores * scale - largest; returns their sums.
static inline __m512 weigh(const Scratch *s, int half, int64_t keys, __m512 scale, __m512 largest) {
    const __m512i low = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                          0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t key = 0; key < keys; key += 32) {
        __m512 tree[5];  // sums of 2, 4, 8, 16 and 32 neighbours
        bf16 *to = s->weights + key * PAIR + half * TILE;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const float *from = s->scores + (key + 2 * i) * PAIR + half * 16;
            __m512 even = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(from), scale, largest));
            __m512 odd = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(from + PAIR), scale, largest));
            __m512 total = _mm512_add_ps(even, odd);
            int level = 0;
#pragma GCC unroll 4
            for (; i >> level & 1; level++) total = _mm512_add_ps(tree[level], total);
            tree[level] = total;
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
            _mm512_storeu_si512(to + i * 32, _mm512_permutexvar_epi16(low, both));
        }
        sum = _mm512_add_ps(sum, tree[4]);
    }
    return sum;
}

// out (dim, PAIR) = out * decay + V^T weights.
static inline void add_values(const Batch *b, const Scratch *s, int64_t pair, int64_t keys, const __m512 decay[2]) {
    int64_t dim = b->dim, dim_tiles = dim / 16;
    float sums[32 * PAIR] __attribute__((aligned(64)));
    for (int64_t d = 0; d < dim_tiles; d += 2) {
        float *out = s->out + (pair * dim + d * 16) * PAIR;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t key = 0; key < keys; key += 32) {
            const bf16 *v = s->values + (key / 32 * dim_tiles + d) * TILE, *weights = s->weights + key * PAIR;
            _tile_loadd(4, v, 64);
            _tile_loadd(6, weights, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, v + TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
                _tile_loadd(7, weights + TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, PAIR * 4);
        _tile_stored(1, sums + 16, PAIR * 4);
        _tile_stored(2, sums + 16 * PAIR, PAIR * 4);
        _tile_stored(3, sums + 16 * PAIR + 16, PAIR * 4);
        for (int64_t i = 0; i < 32; i++)
            for (int half = 0; half < 2; half++) {
                float *to = out + i * PAIR + half * 16;
                __m512 sum = _mm512_load_ps(sums + i * PAIR + half * 16);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), decay[half], sum));
            }
    }
}

// One span for one pair of tiles of rows.
static void attend(const Batch *b, const Scratch *s, int64_t pair, int64_t start, int64_t keys) {
    const __m512 scale = _mm512_set1_ps(b->scale);
    const int64_t sure = s->positions[pair * PAIR] + 1 - start;
    __m512 largest[2] = {_mm512_set1_ps(-__builtin_inff()), _mm512_set1_ps(-__builtin_inff())}, decay[2];
    for (int64_t key = 0; key < keys; key += 32) {
        score(b, s, pair, key, least(key + 32, keys - 32));
        // What has just been stored could not be read yet.
        if (key) find_largest(s, pair, start, key - 32, sure, largest);
    }
    find_largest(s, pair, start, keys - 32, sure, largest);
    for (int half = 0; half < 2; half++) {
        float *highest = s->highest + pair * PAIR + half * 16, *sums = s->sums + pair * PAIR + half * 16;
        __m512 before = _mm512_loadu_ps(highest), after = _mm512_max_ps(before, largest[half]);
        __m512 scaled = _mm512_mul_ps(after, scale);
        decay[half] = power_of_2(_mm512_sub_ps(_mm512_mul_ps(before, scale), scaled));
        __m512 sum = weigh(s, half, keys, scale, scaled);
        _mm512_storeu_ps(highest, after);
        _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(sums), decay[half], sum));
    }
    add_values(b, s, pair, keys, decay);
}

// -- a key in each lane, for few rows --

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
static void attend_few(const Batch *b, const Scratch *s, int64_t rows, int64_t start, int64_t end) {
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

// -- blocks --

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

static void put_few(const Batch *b, const Scratch *s, int64_t seq, int64_t head, int64_t first_row, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
        __m512 scale = _mm512_set1_ps(1.0f / s->sums[i]);
        for (int64_t d = 0; d < b->dim; d += 32) {
            const float *from = s->out + i * b->dim + d;
            put(b, seq, head, first_row + i, d, _mm512_mul_ps(_mm512_loadu_ps(from), scale),
                _mm512_mul_ps(_mm512_loadu_ps(from + 16), scale));
        }
    }
}

static void put_many(const Batch *b, const Scratch *s, int64_t seq, int64_t head, int64_t first_row, int64_t rows) {
    for (int64_t start = 0; start < rows; start += 16) {
        const float *out = s->out + start / PAIR * PAIR * b->dim + start % PAIR;
        __m512 scale = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_loadu_ps(s->sums + start));
        for (int64_t d = 0; d < b->dim; d += 32) {
            __m512i first[16], second[16];
            for (int i = 0; i < 16; i++) {
                const float *from = out + (d + i) * PAIR;
                first[i] = (__m512i)_mm512_mul_ps(_mm512_loadu_ps(from), scale);
                second[i] = (__m512i)_mm512_mul_ps(_mm512_loadu_ps(from + 16 * PAIR), scale);
            }
            transpose(first);
            transpose(second);
            for (int64_t i = 0; i < 16 && start + i < rows; i++)
                put(b, seq, head, first_row + start + i, d, (__m512)first[i], (__m512)second[i]);
        }
    }
}

static void attend_many(const Batch *b, const Scratch *s, int64_t rows, int64_t start, int64_t end) {
    for (int64_t key = 0; key < end - start; key += 32) transpose_values(s, key, end - start, b->dim);
    for (int64_t pair = 0; pair * PAIR < rows; pair++) {
        int64_t keys = least(s->positions[pair * PAIR + PAIR - 1] + 1 - start, SPAN);
        if (keys > 0) attend(b, s, pair, start, (keys + 31) / 32 * 32);
    }
}

// Rows first_row .. of one sequence and K/V head, at most a block of them.
static void attend_block(const Batch *b, const Scratch *s, int64_t seq, int64_t head, int64_t first_row) {
    int64_t rows = least(b->query_lens[seq] * b->group - first_row, BLOCK_ROWS), tiles = (rows + 15) / 16;
    if (rows > FEW_ROWS) tiles += tiles % 2;
    for (int64_t tile = 0; tile < tiles; tile++)
        load_queries(b, s, tile, seq, head, first_row + tile * 16, least(16, rows - tile * 16));
    int64_t end = s->positions[tiles * 16 - 1] + 1;
    if (rows > FEW_ROWS) shape_tiles(16, 16);
    for (int64_t start = 0; start < end; start += SPAN) {
        int64_t until = least(end, start + SPAN);
        find(b, s, seq, head, start, until);
        if (rows > FEW_ROWS) {
            attend_many(b, s, rows, start, until);
        } else {
            attend_few(b, s, rows, start, until);
        }
    }
    if (rows > FEW_ROWS) {
        put_many(b, s, seq, head, first_row, rows);
    } else {
        put_few(b, s, seq, head, first_row, rows);
    }
}

// q (tokens, heads, dim), tokens q_stride apart -> out (tokens, heads * dim), laid out as `layout` says. `items` are (sequence, K/V head, first row)
// of the blocks, 512 rows each but the last of a sequence; dim % 32 == 0 and at most LARGEST_DIM.
void nano_attention(const bf16 *q, const bf16 *cache, bf16 *out, const int64_t *items, int64_t num_items,
                    const int64_t *tables, int64_t table_stride, const int64_t *starts, const int64_t *query_lens,
                    const int64_t *seq_lens, int64_t block_size, int64_t group, int64_t kv_heads, int64_t dim,
                    int64_t q_stride, float scale, int layout, char *scratch, int threads) {
    const Batch batch = {q,     cache,      out,   tables,   starts, query_lens, seq_lens, table_stride,
                         block_size, group, kv_heads, dim,   q_stride,   scale * LOG2_E, layout};
    int64_t next = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        const Scratch own = divide(scratch + thread * nano_attention_scratch(dim), dim);
        for (;;) {
            int64_t number = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (number >= num_items) break;
            attend_block(&batch, &own, items[3 * number], items[3 * number + 1], items[3 * number + 2]);
        }
        _tile_release();
    }
}
