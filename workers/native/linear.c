// x @ weight.T in AMX tiles. Every number of the result is one sum over in_features, in one order, 32 products at a
// time in float32, whatever rows stand beside it and however many threads there are. Knows no layer.
//
// A weight is packed into panels of two tiles side by side, [panel][k / 32][tile][16][32], so that whoever computes a
// panel reads memory from front to back.
#include "common.h"
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    BLOCK_BYTES = 1 << 20,  // of x, that are gone through for each panel: half of a usual second cache
    BLOCK_ROWS = 512,       // the most of x
    CHUNK = 8,              // of 32 products: 16 KiB of a panel
    FEW_PAIRS = 2,          // of tiles of rows, which are not worth storing sums between chunks
};

// Asks the kernel for the tiles' registers, once a process; 0 when they may be used.
int nano_init(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

// Large pages spare a weight that is read from front to back most of its page walks.
void nano_use_large_pages(void *start, int64_t bytes) {
    const uintptr_t page = 1 << 21;
    uintptr_t begin = ((uintptr_t)start + page - 1) & -page, end = ((uintptr_t)start + (uintptr_t)bytes) & -page;
    if (end > begin) (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
}

// Rows `first` to first + count of a weight of k columns, k a multiple of 32, into their places in `packed`; they lie
// `stride` apart. With `half`, a panel's tiles hold rows p and half + p (gate and up) of the weight.
void nano_pack(const bf16 *rows, int64_t stride, bf16 *packed, int64_t first, int64_t count, int64_t k, int64_t half,
               int threads) {
    if (half && first < half && first + count > half) {
        nano_pack(rows, stride, packed, first, half - first, k, half, threads);
        rows += (half - first) * stride, count -= half - first, first = half;
    }
    int64_t of_up = half && first >= half, k_tiles = k / TILE_K;
    int64_t begin = of_up ? first - half : first, end = begin + count;
#pragma omp parallel for num_threads(threads)
    for (int64_t upper = begin / 16; upper < (end + 15) / 16; upper++) {
        int64_t panel = half ? upper : upper / 2, tile = half ? of_up : upper % 2;
        int64_t from = begin > upper * 16 ? begin - upper * 16 : 0, to = least(16, end - upper * 16);
        __mmask16 lanes = (__mmask16)((1u << to) - (1u << from));  // the other rows of the tile come from other calls
        const bf16 *row = rows + (upper * 16 - begin) * stride;
        for (int64_t kt = 0; kt < k_tiles; kt++) {
            bf16 *place = packed + ((panel * k_tiles + kt) * 2 + tile) * TILE;
            __m512i columns[16];
            for (int64_t i = 0; i < 16; i++)
                columns[i] = i >= from && i < to ? _mm512_loadu_si512(row + i * stride + kt * TILE_K)
                                                 : _mm512_setzero_si512();
            transpose(columns);
            for (int64_t i = 0; i < 16; i++) _mm512_mask_storeu_epi32(place + i * 32, lanes, columns[i]);
        }
    }
}

// The rows `ids` of a packed weight (n, k) that is not halved -> out (count, k). -1 where there is no such row.
int nano_look_up(const bf16 *packed, const int64_t *ids, bf16 *out, int64_t count, int64_t n, int64_t k, int threads) {
    const __m512i pairs = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    int64_t k_tiles = k / TILE_K;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= n) return -1;
#pragma omp parallel for num_threads(count < 16 ? 1 : threads)
    for (int64_t i = 0; i < count; i++) {
        const bf16 *tile = packed + (ids[i] / 32 * k_tiles * 2 + ids[i] % 32 / 16) * TILE + ids[i] % 16 * 2;
        for (int64_t kt = 0; kt < k_tiles; kt++, tile += 2 * TILE)
            _mm512_storeu_si512(out + i * k + kt * TILE_K, _mm512_i32gather_epi32(pairs, tile, 4));
    }
    return 0;
}

typedef struct {
    const bf16 *x, *packed, *bias;  // bias may be NULL
    void *out;
    int64_t m, n, k;
    int64_t x_tile, x_step;  // from a tile of x to the next one below, and to the next one beside it
    int64_t x_row;           // bytes from a row of a tile to the next one
    int64_t out_stride;
    int kind, layout, past_caches;
} Job;

static inline __m512 silu(__m512 x) {  // x / (1 + e^-x), relative error below 1e-6
    __m512 power = _mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)), _mm512_set1_ps(125.0f));
    __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), power_of_2(power)), inverse = _mm512_rcp14_ps(below);
    inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(below, inverse, _mm512_set1_ps(2.0f)));
    return _mm512_mul_ps(x, inverse);
}

// Write silu(gate) * up of one panel and up to 16 rows: two tiles of (16, 16) float32.
static void put_swiglu(const Job *job, const float *gate, const float *up, int64_t row, int64_t rows, int64_t panel) {
    int64_t start = panel * 16, total = job->n / 2, stride = job->layout == IN_TILES ? TILE_K : job->out_stride;
    __mmask16 within = first(total - start);
    __m512 gate_bias = _mm512_setzero_ps(), up_bias = _mm512_setzero_ps();
    if (job->bias) {
        gate_bias = load_wide_some(job->bias + start, within);
        up_bias = load_wide_some(job->bias + total + start, within);
    }
    bf16 *to = job->out;
    to += job->layout == IN_TILES ? place_in_tiles(row, start, total) : row * stride + start;
    for (int64_t i = 0; i < rows; i++, to += stride) {
        __m512 a = _mm512_add_ps(_mm512_load_ps(gate + i * 16), gate_bias);
        __m512 b = _mm512_add_ps(_mm512_load_ps(up + i * 16), up_bias);
        _mm256_mask_storeu_epi16(to, within, narrow(_mm512_mul_ps(silu(a), b)));
    }
}

// Write the sums of one panel and up to 16 rows: two tiles of (16, 16) float32.
static void put(const Job *job, const float *left, const float *right, int64_t row, int64_t rows, int64_t panel) {
    if (job->kind == SWIGLU) return put_swiglu(job, left, right, row, rows, panel);
    int64_t start = panel * 32, rest = job->n - start - 16;
    __mmask16 in_left = first(rest + 16), in_right = rest > 0 ? first(rest) : 0;
    __m512 bias_left = _mm512_setzero_ps(), bias_right = _mm512_setzero_ps();
    if (job->bias) {
        bias_left = load_wide_some(job->bias + start, in_left);
        bias_right = load_wide_some(job->bias + start + 16, in_right);
    }
    for (int64_t i = 0; i < rows; i++) {
        __m512 a = _mm512_add_ps(_mm512_load_ps(left + i * 16), bias_left);
        __m512 b = _mm512_add_ps(_mm512_load_ps(right + i * 16), bias_right);
        int64_t at = (row + i) * job->out_stride + start;
        if (job->kind == WIDE) {
            _mm512_mask_storeu_ps((float *)job->out + at, in_left, a);
            _mm512_mask_storeu_ps((float *)job->out + at + 16, in_right, b);
            continue;
        }
        bf16 *to = (bf16 *)job->out + at;
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        if (job->past_caches) {
            _mm512_stream_si512((void *)to, both);
        } else {
            _mm512_mask_storeu_epi16(to, in_left | (__mmask32)in_right << 16, both);
        }
    }
}

typedef struct {  // of a product
    int64_t panel, row, rows;     // up to 32
    int64_t from, to;             // steps of k; those before `from` are in `sums`
    float *sums;                  // (4, 16, 16)
    int64_t first_line, lines;    // of each step of the next panel, which are asked for meanwhile
} Part;

// A part whose tiles have 16 rows, or, of plain rows, as many as there are.
static void multiply(const Job *job, const Part *part) {
    int64_t k_tiles = job->k / TILE_K, stride = job->x_row;
    const bf16 *upper = job->x + part->row / 16 * job->x_tile + part->from * job->x_step, *lower = upper + job->x_tile;
    const bf16 *w = job->packed + (part->panel * k_tiles + part->from) * 2 * TILE;
    float *sums = part->sums;
    if (part->from) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t kt = part->from; kt < part->to; kt++, w += 2 * TILE, upper += job->x_step, lower += job->x_step) {
        _tile_loadd(6, w, 64);
        _tile_loadd(4, upper, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        const char *ahead = (const char *)(w + k_tiles * 2 * TILE) + part->first_line * 64;
        for (int64_t line = 0; line < part->lines; line++) _mm_prefetch(ahead + line * 64, _MM_HINT_T1);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    if (part->to < k_tiles) return;
    put(job, sums, sums + 256, part->row, least(part->rows, 16), part->panel);
    if (part->rows > 16) put(job, sums + 512, sums + 768, part->row + 16, part->rows - 16, part->panel);
}

// Up to 16 rows from `row` on of one panel or two side by side: memory is read faster in more than one place.
static void multiply_few(const Job *job, int64_t row, int64_t rows, int64_t panel, int64_t count) {
    float sums[4][256] __attribute__((aligned(64)));
    int64_t k_tiles = job->k / TILE_K, stride = job->x_row;
    const bf16 *x = job->x + row / 16 * job->x_tile, *w = job->packed + panel * k_tiles * 2 * TILE;
    const bf16 *second = w + (count - 1) * k_tiles * 2 * TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t kt = 0; kt < k_tiles; kt++, w += 2 * TILE, second += 2 * TILE, x += job->x_step) {
        _tile_loadd(4, x, stride);
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

// Rows block .. end of one panel, in tiles of 16. The panel's tiles of CHUNK steps of k stay in the innermost cache
// while all rows pass by: reading both operands from the cache behind it takes longer than multiplying them.
static void multiply_block(const Job *job, int64_t panel, int64_t block, int64_t end, float *sums) {
    int64_t k_tiles = job->k / TILE_K, pairs = (end - block + 31) / 32, chunk = pairs > FEW_PAIRS ? CHUNK : k_tiles;
    int64_t lines = (2 * TILE * (int64_t)sizeof(bf16) / 64 + pairs - 1) / pairs;
    for (int64_t from = 0; from < k_tiles; from += chunk)
        for (int64_t pair = 0; pair < pairs; pair++) {
            int64_t row = block + pair * 32;
            Part part = {panel, row, least(32, end - row), from, least(from + chunk, k_tiles), sums + pair * 1024,
                         pair * lines, lines};
            multiply(job, &part);
        }
}

// More than 16 rows of a run of panels.
static void multiply_many(const Job *job, int64_t first_panel, int64_t end_panel) {
    static __thread float sums[BLOCK_ROWS * 32] __attribute__((aligned(4096)));
    int64_t block_rows = least(BLOCK_BYTES / (2 * job->k) / 32 * 32, BLOCK_ROWS);
    if (block_rows < 32) block_rows = 32;
    for (int64_t block = 0; block < job->m; block += block_rows) {
        int64_t end = least(job->m, block + block_rows);
        int64_t whole = job->layout == IN_TILES ? end : block + (end - block) / 32 * 32, rest = end - whole;
        if (whole > block) shape_tiles(16, 16);
        for (int64_t panel = first_panel; panel < end_panel; panel++) {
            if (rest && whole > block) shape_tiles(16, 16);
            if (whole > block) multiply_block(job, panel, block, whole, sums);
            if (rest > 16) {
                Part part = {panel, whole, rest, 0, job->k / TILE_K, sums, 0, 0};
                shape_tiles(16, (int)rest - 16);
                multiply(job, &part);
            } else if (rest) {
                shape_tiles((int)rest, (int)rest);
                multiply_few(job, whole, rest, panel, 1);
            }
        }
    }
}

// x (m, k), laid out as `layout` says, plain rows x_stride apart -> out (m, n) of rows out_stride apart, of SWIGLU
// (m, n / 2) laid out as x is.
void nano_linear(const bf16 *x, const bf16 *packed, const bf16 *bias, void *out, int64_t m, int64_t n, int64_t k,
                 int64_t x_stride, int64_t out_stride, int kind, int layout, int threads) {
    int is_aligned = n % 32 == 0 && ((uintptr_t)out | (uintptr_t)out_stride * 2) % 64 == 0;
    Job job = {x, packed, bias, out, m, n, k, 16 * x_stride, TILE_K, 2 * x_stride, out_stride, kind, layout,
               kind == NARROW && is_aligned && m * n * 2 > BLOCK_BYTES};
    if (layout == IN_TILES) job.x_tile = 16 * k, job.x_step = TILE, job.x_row = 64;
    int64_t panels = kind == SWIGLU ? (n / 2 + 15) / 16 : (n + 31) / 32;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        int64_t first_panel = panels * thread / threads, end_panel = panels * (thread + 1) / threads;
        if (m > 16) {
            multiply_many(&job, first_panel, end_panel);
        } else {
            shape_tiles((int)m, (int)m);
            for (int64_t panel = first_panel; panel < end_panel; panel += 2)
                multiply_few(&job, 0, m, panel, least(2, end_panel - panel));
        }
        _tile_release();
        _mm_sfence();  // what went past the caches
    }
}
