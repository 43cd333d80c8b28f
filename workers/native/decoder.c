// The layers of a decoder as one call, or as one for each half of a layer where Python must add up the ranks' parts in
// between: what workers/models/decoder.py does kernel by kernel, with the same bits. Knows no sequence.
#include "common.h"

typedef struct {  // a bias or head_norm may be NULL
    const bf16 *input_norm, *qkv, *qkv_bias, *head_norm, *o, *o_bias;
    const bf16 *post_norm, *gate_up, *gate_up_bias, *down, *down_bias;
} Layer;

typedef struct {
    const Layer *layers;
    int64_t num_layers, size, heads, kv_heads, dim, intermediate;
    float eps, scale;
} Model;

typedef struct {
    int64_t tokens, angle_stride, num_items, table_stride, block_size, threads;
    const float *cos, *sin;
    const int64_t *slots, *items, *tables, *starts, *query_lens, *seq_lens;
    bf16 *const *caches;
    char *scratch;
    // (tokens, …): size, (heads + 2 kv_heads) dim, heads dim, intermediate. All but qkv lie in tiles.
    bf16 *normed, *qkv, *attended, *gated;
} Step;

// x (tokens, size) += residual, if there is one; out = o_proj(attention(qkv_proj(norm(x)))), this rank's part of it.
void nano_attention_half(const Model *m, const Step *s, int64_t index, bf16 *x, const bf16 *residual, bf16 *out) {
    const Layer *layer = m->layers + index;
    int64_t own = m->heads * m->dim, kv = m->kv_heads * m->dim, width = own + 2 * kv;
    int threads = (int)s->threads;
    bf16 *cache = s->caches[index], *k = s->qkv + own, *v = k + kv;
    nano_add_rms_norm(x, residual, layer->input_norm, s->normed, s->tokens, m->size, m->eps, IN_TILES, threads);
    nano_linear(s->normed, layer->qkv, layer->qkv_bias, s->qkv, s->tokens, width, m->size, m->size, width, NARROW,
                IN_TILES, threads);
    nano_norm_rotate(s->qkv, layer->head_norm, s->cos, s->sin, s->tokens, m->heads + m->kv_heads, m->dim, width,
                     s->angle_stride, m->eps, threads);
    nano_store(k, v, s->slots, cache, s->tokens, m->kv_heads, m->dim, s->block_size, width, width, threads);
    nano_attention(s->qkv, cache, s->attended, s->items, s->num_items, s->tables, s->table_stride, s->starts,
                   s->query_lens, s->seq_lens, s->block_size, m->heads / m->kv_heads, m->kv_heads, m->dim, width,
                   m->scale, IN_TILES, s->scratch, threads);
    nano_linear(s->attended, layer->o, layer->o_bias, out, s->tokens, m->size, own, own, m->size, NARROW, IN_TILES,
                threads);
}

// x (tokens, size) += residual; out = down_proj(silu(gate) * up), gate and up of norm(x), this rank's part of it.
void nano_mlp_half(const Model *m, const Step *s, int64_t index, bf16 *x, const bf16 *residual, bf16 *out) {
    const Layer *layer = m->layers + index;
    int64_t wide = m->intermediate;
    int threads = (int)s->threads;
    nano_add_rms_norm(x, residual, layer->post_norm, s->normed, s->tokens, m->size, m->eps, IN_TILES, threads);
    nano_linear(s->normed, layer->gate_up, layer->gate_up_bias, s->gated, s->tokens, 2 * wide, m->size, m->size, wide,
                SWIGLU, IN_TILES, threads);
    nano_linear(s->gated, layer->down, layer->down_bias, out, s->tokens, m->size, wide, wide, m->size, NARROW, IN_TILES,
                threads);
}

// All layers: x in, their contribution out; residual (tokens, size) out, which x has not been added to yet. Each half's
// part is added up over `group`, unless that is NULL. Not 0 when the step was over before its end.
int nano_layers(const Model *m, const Step *s, bf16 *x, bf16 *residual, Group *group) {
    int64_t numel = s->tokens * m->size;
    for (int64_t index = 0; index < m->num_layers; index++) {
        nano_attention_half(m, s, index, x, index ? residual : 0, residual);  // read before it is written
        int over = group ? nano_all_reduce(group, residual, numel, (int)s->threads) : 0;
        if (over) return over;
        nano_mlp_half(m, s, index, residual, x, x);
        if (group && (over = nano_all_reduce(group, x, numel, (int)s->threads))) return over;
    }
    return 0;
}
