// x @ weight.T in AMX tiles. Every number of the result is one sum over in_features, in one order, 32 products at a
// time in float32, whatever rows stand beside it and however many threads there are. Knows no layer.
//
// A weight is packed into panels of two tiles side by side, [panel][k / 32][tile][16][32], so that whoever computes a
// panel reads memory from front to back.
#include "common.h"
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BLOCK_BYTES = 1 << 20 };  // of x, that is gone through for each panel

// Asks the kernel for the tiles' registers, once a process; 0 when they may be used.
int nano_init(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

// Large pages spare a weight that is read from front to back most of its page walks. To be called before it is written.
void nano_use_large_pages(void *start, int64_t bytes) {
    const uintptr_t page = 1 << 21;
    uintptr_t begin = ((uintptr_t)start + page - 1) & -page, end = ((uintptr_t)start + (uintptr_t)bytes) & -page;
    if (end > begin) (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
}

// weight (n, k), k a multiple of 32 -> packed. With `half`, a panel's tiles hold rows p and half + p (gate and up).
void nano_pack(const bf16 *weight, bf16 *packed, int64_t n, int64_t k, int64_t half, int threads) {
    int64_t step = half ? 16 : 32, panels = ((half ? half : n) + step - 1) / step, k_tiles = k / TILE_K;
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t tile = 0; tile < 2; tile++) {
            int64_t start = half ? panel * 16 + tile * half : panel * 32 + tile * 16;
            int64_t rows = least(16, (half ? (tile + 1) * half : n) - start);
            for (int64_t kt = 0; kt < k_tiles; kt++) {
                bf16 *to = packed + ((panel * k_tiles + kt) * 2 + tile) * TILE;
                __m512i columns[16];
                for (int64_t i = 0; i < 16; i++) {
                    const bf16 *row = weight + (start + i) * k + kt * TILE_K;
                    columns[i] = i < rows ? _mm512_loadu_si512(row) : _mm512_setzero_si512();
                }
                transpose(columns);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * 32, columns[i]);
            }
        }
}

typedef struct {
    const bf16 *x, *packed, *bias;  // bias may be NULL
    void *out;
    int64_t m, n, k, x_stride, out_stride;
    int kind;
} Job;

static inline __m512 silu(__m512 x) {
    __m512 negative = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(88.0f));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(negative)));
}

// Write the sums of one panel and up to 16 rows: two tiles of (16, 16) float32.
static void put(const Job *job, const float *left, const float *right, int64_t row, int64_t rows, int64_t panel) {
    int64_t columns = job->kind == SWIGLU ? 16 : 32, start = panel * columns, total = job->n;
    if (job->kind == SWIGLU) total /= 2;
    __mmask16 in_left = first(total - start), in_right = total - start > 16 ? first(total - start - 16) : 0;
    __m512 bias_left = _mm512_setzero_ps(), bias_right = _mm512_setzero_ps();
    if (job->bias) {
        int64_t second = job->kind == SWIGLU ? total + start : start + 16;
        bias_left = load_wide_some(job->bias + start, in_left);
        bias_right = load_wide_some(job->bias + second, job->kind == SWIGLU ? in_left : in_right);
    }
    for (int64_t i = 0; i < rows; i++) {
        __m512 a = _mm512_add_ps(_mm512_load_ps(left + i * 16), bias_left);
        __m512 b = _mm512_add_ps(_mm512_load_ps(right + i * 16), bias_right);
        int64_t at = (row + i) * job->out_stride + start;
        if (job->kind == WIDE) {
            _mm512_mask_storeu_ps((float *)job->out + at, in_left, a);
            _mm512_mask_storeu_ps((float *)job->out + at + 16, in_right, b);
        } else if (job->kind == NARROW) {
            _mm256_mask_storeu_epi16((bf16 *)job->out + at, in_left, narrow(a));
            _mm256_mask_storeu_epi16((bf16 *)job->out + at + 16, in_right, narrow(b));
        } else {
            _mm256_mask_storeu_epi16((bf16 *)job->out + at, in_left, narrow(_mm512_mul_ps(silu(a), b)));
        }
    }
}

// 17 to 32 rows from `row` on of one panel.
static void multiply(const Job *job, int64_t row, int64_t rows, int64_t panel) {
    float sums[4][256] __attribute__((aligned(64)));
    int64_t k_tiles = job->k / TILE_K, stride = job->x_stride * 2;
    const bf16 *x = job->x + row * job->x_stride, *w = job->packed + panel * k_tiles * 2 * TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const bf16 *lower = x + 16 * job->x_stride;
    for (int64_t kt = 0; kt < k_tiles; kt++, w += 2 * TILE) {
        _tile_loadd(6, w, 64);
        _tile_loadd(4, x + kt * TILE_K, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower + kt * TILE_K, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    put(job, sums[0], sums[1], row, 16, panel);
    put(job, sums[2], sums[3], row + 16, rows - 16, panel);
}

// Up to 16 rows from `row` on of one panel or two side by side: memory is read faster in more than one place.
static void multiply_few(const Job *job, int64_t row, int64_t rows, int64_t panel, int64_t count) {
    float sums[4][256] __attribute__((aligned(64)));
    int64_t k_tiles = job->k / TILE_K, stride = job->x_stride * 2;
    const bf16 *x = job->x + row * job->x_stride, *w = job->packed + panel * k_tiles * 2 * TILE;
    const bf16 *second = w + (count - 1) * k_tiles * 2 * TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t kt = 0; kt < k_tiles; kt++, w += 2 * TILE, second += 2 * TILE) {
        _tile_loadd(4, x + kt * TILE_K, stride);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (count == 1) continue;
        _tile_loadd(6, second, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, second + TILE, 64);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    put(job, sums[0], sums[1], row, rows, panel);
    if (count > 1) put(job, sums[2], sums[3], row, rows, panel + 1);
}

static void multiply_panels(const Job *job, int64_t first_panel, int64_t end_panel) {
    if (job->m <= 16) {
        shape_tiles((int)job->m, (int)job->m);
        for (int64_t panel = first_panel; panel < end_panel; panel += 2)
            multiply_few(job, 0, job->m, panel, least(2, end_panel - panel));
        return;
    }
    int64_t rows_at_once = BLOCK_BYTES / (2 * job->k) / 32 * 32;
    if (rows_at_once < 32) rows_at_once = 32;
    for (int64_t block = 0; block < job->m; block += rows_at_once) {
        int64_t end = least(job->m, block + rows_at_once), whole = block + (end - block) / 32 * 32, rest = end - whole;
        if (whole > block) shape_tiles(16, 16);
        for (int64_t panel = first_panel; panel < end_panel; panel++) {
            if (rest && whole > block) shape_tiles(16, 16);
            for (int64_t row = block; row < whole; row += 32) multiply(job, row, 32, panel);
            if (rest > 16) {
                shape_tiles(16, (int)rest - 16);
                multiply(job, whole, rest, panel);
            } else if (rest) {
                shape_tiles((int)rest, (int)rest);
                multiply_few(job, whole, rest, panel, 1);
            }
        }
    }
}

// x (m, k) of rows x_stride apart -> out (m, n), of SWIGLU (m, n / 2), of rows out_stride apart.
void nano_linear(const bf16 *x, const bf16 *packed, const bf16 *bias, void *out, int64_t m, int64_t n, int64_t k,
                 int64_t x_stride, int64_t out_stride, int kind, int threads) {
    const Job job = {x, packed, bias, out, m, n, k, x_stride, out_stride, kind};
    int64_t panels = kind == SWIGLU ? (n / 2 + 15) / 16 : (n + 31) / 32;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        multiply_panels(&job, panels * thread / threads, panels * (thread + 1) / threads);
        _tile_release();
    }
}
