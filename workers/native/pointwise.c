// What is done to rows of activations between the matrix products, computed in float32 and rounded where the plain
// twins round (workers/layers/norm.py, rotary.py). A row's bits depend on nothing but the row. Knows no layer.
#include "common.h"

enum { WORTH_THREADS = 1 << 15 };  // numbers; fewer are done before another thread has woken up

static inline float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

// x (rows, size) += residual, if there is one; out = x / sqrt(mean(x * x) + eps) * weight, laid out as `layout` says.
void nano_add_rms_norm(bf16 *x, const bf16 *residual, const bf16 *weight, bf16 *out, int64_t rows, int64_t size,
                       float eps, int layout, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size >= WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        bf16 *own = x + row * size;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < size; i += 16) {
            __mmask16 some = first(size - i);
            __m512 value = load_wide_some(own + i, some);
            if (residual) {
                value = rounded(_mm512_add_ps(value, load_wide_some(residual + row * size + i, some)));
                _mm256_mask_storeu_epi16(own + i, some, narrow(value));
            }
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        float mean = _mm512_reduce_add_ps(squares) / (float)size;
        __m512 scale = _mm512_set1_ps(1.0f / root(mean + eps));
        for (int64_t i = 0; i < size; i += 16) {
            __mmask16 some = first(size - i);
            __m512 value = rounded(_mm512_mul_ps(load_wide_some(own + i, some), scale));
            bf16 *to = out + (layout == IN_TILES ? place_in_tiles(row, i, size) : row * size + i);
            _mm256_mask_storeu_epi16(to, some, narrow(_mm512_mul_ps(value, load_wide_some(weight + i, some))));
        }
    }
}

// Heads x (tokens, heads, dim), tokens `stride` apart, in place: normalised by weight (heads, dim), if there is one,
// then rotated by the angles of their tokens; cos and sin are (tokens, dim / 2), `angle_stride` apart. dim % 32 == 0.
void nano_norm_rotate(bf16 *x, const bf16 *weight, const float *cos, const float *sin, int64_t tokens, int64_t heads,
                      int64_t dim, int64_t stride, int64_t angle_stride, float eps, int threads) {
    int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim >= WORTH_THREADS)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++) {
            bf16 *own = x + token * stride + head * dim;
            const bf16 *factor = weight ? weight + head * dim : 0;
            __m512 scale = _mm512_set1_ps(1.0f);
            if (weight) {
                __m512 squares = _mm512_setzero_ps();
                for (int64_t i = 0; i < dim; i += 16) {
                    __m512 value = load_wide(own + i);
                    squares = _mm512_fmadd_ps(value, value, squares);
                }
                scale = _mm512_set1_ps(1.0f / root(_mm512_reduce_add_ps(squares) / (float)dim + eps));
            }
            for (int64_t i = 0; i < half; i += 16) {
                __m512 a = load_wide(own + i), b = load_wide(own + half + i);
                if (weight) {
                    a = rounded(_mm512_mul_ps(rounded(_mm512_mul_ps(a, scale)), load_wide(factor + i)));
                    b = rounded(_mm512_mul_ps(rounded(_mm512_mul_ps(b, scale)), load_wide(factor + half + i)));
                }
                __m512 c = _mm512_loadu_ps(cos + token * angle_stride + i);
                __m512 s = _mm512_loadu_ps(sin + token * angle_stride + i);
                _mm256_storeu_si256((void *)(own + i), narrow(_mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s))));
                _mm256_storeu_si256((void *)(own + half + i), narrow(_mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s))));
            }
        }
}

// K and V (tokens, heads, dim) of rows k_stride and v_stride apart into their slots of the cache (see attention.c).
void nano_store(const bf16 *k, const bf16 *v, const int64_t *slots, bf16 *cache, int64_t tokens, int64_t heads,
                int64_t dim, int64_t block_size, int64_t k_stride, int64_t v_stride, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim >= WORTH_THREADS)
    for (int64_t token = 0; token < tokens; token++) {
        int64_t block = slots[token] / block_size, at = slots[token] % block_size;
        bf16 *to = cache + (block * 2 * heads * block_size + at) * dim;
        for (int64_t head = 0; head < heads; head++, to += block_size * dim) {
            memcpy(to, k + token * k_stride + head * dim, (size_t)dim * sizeof(bf16));
            memcpy(to + heads * block_size * dim, v + token * v_stride + head * dim, (size_t)dim * sizeof(bf16));
        }
    }
}
