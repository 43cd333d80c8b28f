// The sum over ranks that share memory: what workers/parallel/shared_memory.py does for a tensor, in the same file and
// by the same rules, which that module explains. Knows no deadline and no dead rank: who is late is waited for there.
#include "common.h"
#include <time.h>

enum { WORTH_THREADS = 1 << 16, LOOKS = 64 };

static inline int64_t now(void) {  // nanoseconds
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

// 0 once `other` has reached exchange `count`; anything else when the step is over for this rank.
static int await(const Group *g, int64_t other, int64_t count) {
    const int64_t *flag = g->flags + other * g->words_per_rank;
    int64_t reached = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
    if (reached < count && g->spin_ns > 0) {
        int64_t end = now() + g->spin_ns;
        do {
            for (int i = 0; i < LOOKS && (reached = __atomic_load_n(flag, __ATOMIC_ACQUIRE)) < count; i++) _mm_pause();
        } while (reached < count && now() < end);
    }
    // Behind the next generation's beginning nothing is of this step: let Python say so.
    return reached < count || reached >= g->next_generation ? g->wait(other, count) : 0;
}

static int await_all(const Group *g, int64_t count) {
    for (int64_t other = 0; other < g->world_size; other++) {
        int over = other == g->rank ? 0 : await(g, other, count);
        if (over) return over;
    }
    return 0;
}

// x (numel) becomes its sum over all ranks, added in their order in float32 and rounded once.
int nano_all_reduce(Group *g, bf16 *x, int64_t numel, int threads) {
    int64_t most = g->slot_bytes / (int64_t)sizeof(bf16);
    for (int64_t start = 0; start < numel; start += most) {
        bf16 *part = x + start;
        int64_t size = least(most, numel - start), count = ++g->count;
        char *slots = g->slots + count % 2 * g->world_size * g->slot_bytes;
        int over = await_all(g, count - 1);
        if (over) return over;
        memcpy(slots + g->rank * g->slot_bytes, part, (size_t)size * sizeof(bf16));
        __atomic_store_n(g->flags + g->rank * g->words_per_rank, count, __ATOMIC_RELEASE);
        if ((over = await_all(g, count))) return over;
#pragma omp parallel for num_threads(threads) if (size >= WORTH_THREADS)
        for (int64_t i = 0; i < size; i += 16) {
            __mmask16 some = first(size - i);
            __m512 sum = load_wide_some((const bf16 *)slots + i, some);
            for (int64_t rank = 1; rank < g->world_size; rank++)
                sum = _mm512_add_ps(sum, load_wide_some((const bf16 *)(slots + rank * g->slot_bytes) + i, some));
            _mm256_mask_storeu_epi16(part + i, some, narrow(sum));
        }
    }
    return 0;
}
