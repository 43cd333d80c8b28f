// Causal attention over a paged cache in AMX tiles. Knows no sequence but by its block table and lengths.
//
// The cache is (block, key or value, K/V head, token, dim). The rows of a query block are (token, member of the group
// of heads that share a K/V head). Keys are taken in spans that begin at multiples of SPAN. Per span: scores = K Q^T, 2
// to the power of what they are below the largest one, V weighted by it, and what the spans before gave is rescaled to
// the larger maximum. Of many rows 32 are taken at a time, with a row in each lane of a register; few, as those of a
// decode, lie in as few columns of a tile, and each lane has a key. Both add in the same order: products 32 at a time
// by the tiles, weights of 32 keys as a tree of neighbours, then those sums one after the other. So all bits are fixed
// by a row's own position, whatever rows stand beside it and however a prompt is cut into chunks: keys after it have
// the weight 0, which adds nothing. Who computes a block makes no difference either.
#include "attention.h"

int64_t nano_attention_scratch(int64_t dim) {  // bytes for each thread
    int64_t bytes = SPAN / KEYS * 8 * 2 + SPAN * dim * 2 * 3 + BLOCK_ROWS * dim * 2 + SPAN * PAIR * 2;
    return bytes + SPAN * PAIR * 4 * 2 + BLOCK_ROWS * dim * 4 + BLOCK_ROWS * 4 * 3 + 4096;
}

static Scratch divide(char *from, int64_t dim) {
    Scratch s;
    s.key_groups = (const bf16 **)from;              // (SPAN / KEYS) places of KEYS keys, dim apart
    s.value_groups = s.key_groups + SPAN / KEYS;     // the same of values
    s.copies = (bf16 *)(s.value_groups + SPAN / KEYS);  // (2, SPAN, dim) of groups that lie in several pieces
    s.values = s.copies + 2 * SPAN * dim;            // (SPAN / 32, dim / 16) tiles: dims by keys, or key pairs by dims
    s.queries = s.values + SPAN * dim;               // (pairs, 2, dim / 32) tiles of dim pairs by rows
    s.weights = s.queries + BLOCK_ROWS * dim;        // (SPAN / 32, 2) tiles of key pairs by rows, or of rows by keys
    s.scores = (float *)(s.weights + SPAN * PAIR);   // (2, SPAN, PAIR), or (rows, SPAN) and parts of it
    s.out = s.scores + 2 * SPAN * PAIR;                  // (pairs, dim, PAIR), or (rows, dim); dims as in `values`
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
            nano_attend_many(b, s, rows, start, until);
        } else {
            nano_attend_few(b, s, rows, start, until);
        }
    }
    if (rows > FEW_ROWS) {
        nano_put_many(b, s, seq, head, first_row, rows);
    } else {
        nano_put_few(b, s, seq, head, first_row, rows);
    }
}

// q (tokens, heads, dim), tokens q_stride apart -> out (tokens, heads * dim), laid out as `layout` says. `items` are
// (sequence, K/V head, first row) of the blocks, 512 rows each but the last of a sequence; dim % 32 == 0 and at most
// LARGEST_DIM.
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
