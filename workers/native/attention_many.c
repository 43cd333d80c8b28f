// Attention of many rows to a span of keys (see attention.c): 32 rows at a time, a row in each lane of a register.
// While the scores of 32 rows become weights, the tiles multiply those of the next 32.
#include "attention.h"

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

typedef struct {  // of 32 keys and a pair
    const bf16 *queries, *keys, *later, *next_keys, *next_later;  // 16 keys each; those to be asked for meanwhile
    float *to;                                                    // (32, PAIR)
} Product;

static inline Product product_of(const Batch *b, const Scratch *s, int64_t pair, int64_t key, int64_t last_key) {
    const bf16 **keys = s->key_groups + key / KEYS, **next = keys + (key < last_key ? 32 / KEYS : 0);
    float *to = s->scores + (pair % 2 * SPAN + key) * PAIR;
    return (Product){s->queries + pair * PAIR * b->dim, keys[0], keys[1], next[0], next[1], to};
}

static inline void begin_product(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Dims d to d + 31 of K Q^T.
static inline void multiply_dims(const Product *p, int64_t d, int64_t dim) {
    for (int64_t line = 0; line < KEYS; line++) {
        _mm_prefetch((const char *)(p->next_keys + d * KEYS + line * 32), _MM_HINT_T0);
        _mm_prefetch((const char *)(p->next_later + d * KEYS + line * 32), _MM_HINT_T0);
    }
    _tile_loadd(4, p->keys + d, dim * 2);
    _tile_loadd(6, p->queries + d * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, p->later + d, dim * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, p->queries + (dim + d) * 16, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

static inline void end_product(const Product *p) {
    _tile_stored(0, p->to, PAIR * 4);
    _tile_stored(1, p->to + 16, PAIR * 4);
    _tile_stored(2, p->to + 16 * PAIR, PAIR * 4);
    _tile_stored(3, p->to + 16 * PAIR + 16, PAIR * 4);
}

static inline void score(const Batch *b, const Scratch *s, int64_t pair, int64_t key, int64_t last_key) {
    const Product p = product_of(b, s, pair, key, last_key);
    begin_product();
    for (int64_t d = 0; d < b->dim; d += 32) multiply_dims(&p, d, b->dim);
    end_product(&p);
}

// Make scores of 32 keys -inf where a key comes after a row, of which the first `sure` keys come after none; and keep
// the largest of each row.
static inline void find_largest(const Scratch *s, int64_t pair, int64_t start, int64_t key, int64_t sure,
                                __m512 largest[2]) {
    float *scores = s->scores + (pair % 2 * SPAN + key) * PAIR;
    for (int64_t i = sure > key ? sure - key : 0; i < 32; i++)
        for (int half = 0; half < 2; half++) {
            __m512i position = _mm512_loadu_si512(s->positions + pair * PAIR + half * 16);
            __mmask16 after = _mm512_cmplt_epi32_mask(position, _mm512_set1_epi32((int32_t)(start + key + i)));
            _mm512_mask_storeu_ps(scores + i * PAIR + half * 16, after, _mm512_set1_ps(-__builtin_inff()));
        }
#pragma GCC unroll 8
    for (int64_t i = 0; i < 32; i++)
        for (int half = 0; half < 2; half++)
            largest[half] = _mm512_max_ps(largest[half], _mm512_loadu_ps(scores + i * PAIR + half * 16));
}

// weights of 32 keys = 2 to the power of scores * scale - largest; returns their sum. The tiles multiply meanwhile: of
// a product, if there is one, the dims of this half.
static inline __m512 weigh(const Scratch *s, int64_t pair, int half, int64_t key, __m512 scale, __m512 largest,
                           const Product *meanwhile, int64_t dim) {
    const __m512i in_turn =  // lower half and upper half
        _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                          0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    const float *scores = s->scores + (pair % 2 * SPAN + key) * PAIR + half * 16;
    bf16 *to = s->weights + key * PAIR + half * TILE;
    __m512 tree[5];  // sums of 2, 4, 8, 16 and 32 neighbours
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        if (i % 4 == 0 && meanwhile) {
            int64_t part = half * 4 + i / 4, steps = dim / 32;
            for (int64_t step = part * steps / 8; step < (part + 1) * steps / 8; step++)
                multiply_dims(meanwhile, step * 32, dim);
        }
        const float *from = scores + 2 * i * PAIR;
        __m512 even = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(from), scale, largest));
        __m512 odd = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(from + PAIR), scale, largest));
        __m512 total = _mm512_add_ps(even, odd);
        int level = 0;
#pragma GCC unroll 4
        for (; i >> level & 1; level++) total = _mm512_add_ps(tree[level], total);
        tree[level] = total;
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        _mm512_storeu_si512(to + i * 32, _mm512_permutexvar_epi16(in_turn, both));
    }
    return tree[4];
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

// Keys of a span that a pair's rows do not all come before, in whole tiles.
static inline int64_t keys_of(const Scratch *s, int64_t pair, int64_t start) {
    return (least(s->positions[pair * PAIR + PAIR - 1] + 1 - start, SPAN) + 31) / 32 * 32;
}

// One span for one pair of tiles of rows, whose scores are there; those of the next pair are when it returns.
static void attend(const Batch *b, const Scratch *s, int64_t pair, int64_t next_keys, int64_t start,
                   __m512 largest[2]) {
    const __m512 scale = _mm512_set1_ps(b->scale), none = _mm512_set1_ps(-__builtin_inff());
    int64_t keys = keys_of(s, pair, start), next = pair + 1;
    int64_t sure = next_keys ? s->positions[next * PAIR] + 1 - start : 0;
    __m512 decay[2], scaled[2], sum[2], next_largest[2] = {none, none};
    for (int half = 0; half < 2; half++) {
        float *highest = s->highest + pair * PAIR + half * 16;
        __m512 before = _mm512_loadu_ps(highest), after = _mm512_max_ps(before, largest[half]);
        scaled[half] = _mm512_mul_ps(after, scale);
        decay[half] = power_of_2(_mm512_sub_ps(_mm512_mul_ps(before, scale), scaled[half]));
        sum[half] = _mm512_setzero_ps();
        _mm512_storeu_ps(highest, after);
    }
    for (int64_t key = 0; key < keys; key += 32) {
        if (next_keys) {
            const Product p = product_of(b, s, next, key, next_keys - 32);
            begin_product();
            for (int half = 0; half < 2; half++)
                sum[half] = _mm512_add_ps(sum[half], weigh(s, pair, half, key, scale, scaled[half], &p, b->dim));
            end_product(&p);
            // What has just been stored could not be read yet.
            if (key) find_largest(s, next, start, key - 32, sure, next_largest);
        } else {
            for (int half = 0; half < 2; half++)
                sum[half] = _mm512_add_ps(sum[half], weigh(s, pair, half, key, scale, scaled[half], 0, b->dim));
        }
    }
    for (int64_t key = keys; key < next_keys; key += 32) score(b, s, next, key, next_keys - 32);
    for (int64_t key = keys - 32; key < next_keys; key += 32) find_largest(s, next, start, key, sure, next_largest);
    for (int half = 0; half < 2; half++) {
        float *sums = s->sums + pair * PAIR + half * 16;
        _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(sums), decay[half], sum[half]));
        largest[half] = next_largest[half];
    }
    add_values(b, s, pair, keys, decay);
}

void nano_attend_many(const Batch *b, const Scratch *s, int64_t rows, int64_t start, int64_t end) {
    for (int64_t key = 0; key < end - start; key += 32) transpose_values(s, key, end - start, b->dim);
    int64_t pairs = (rows + PAIR - 1) / PAIR, pair = 0;
    while (pair < pairs && keys_of(s, pair, start) <= 0) pair++;
    if (pair == pairs) return;
    __m512 largest[2] = {_mm512_set1_ps(-__builtin_inff()), _mm512_set1_ps(-__builtin_inff())};
    int64_t keys = keys_of(s, pair, start), sure = s->positions[pair * PAIR] + 1 - start;
    for (int64_t key = 0; key < keys; key += 32) score(b, s, pair, key, keys - 32);
    for (int64_t key = 0; key < keys; key += 32) find_largest(s, pair, start, key, sure, largest);
    for (; pair < pairs; pair++)
        attend(b, s, pair, pair + 1 < pairs ? keys_of(s, pair + 1, start) : 0, start, largest);
}

void nano_put_many(const Batch *b, const Scratch *s, int64_t seq, int64_t head, int64_t first_row, int64_t rows) {
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
