/* What Python calls: the choice of an instruction set, the check of all sizes, and a product on several threads. */
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

#define EXPORTED __attribute__((visibility("default")))
#ifndef SOURCES
#define SOURCES "unknown"
#endif

enum { FINE = 0, BAD_SIZE = 1, NO_MEMORY = 2, NO_SUCH_SET = 3 };
enum { FEW = 4, MOST_COLUMNS = 1 << 24, CACHED_ROWS = 128 };

/* The digest of the sources that this library was built from. */
EXPORTED const char *fedtune_sources(void) { return SOURCES; }

#if defined(__x86_64__)
static uint64_t enabled_state(void) { /* the registers that the system saves */
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* 0: neither; 1: AVX2 and FMA; 2: also AVX-512 F, DQ, BW, VL and VNNI; 3: also AVX-512 BF16. */
static int level_of_cpu(void) {
    uint32_t a, b, c, d, highest = __get_cpuid_max(0, NULL);
    if (highest < 7)
        return 0;
    __cpuid(1, a, b, c, d);
    const uint32_t saved = 1u << 27, avx = 1u << 28, fma = 1u << 12;
    if ((c & (saved | avx | fma)) != (saved | avx | fma) || (enabled_state() & 6) != 6)
        return 0;
    __cpuid_count(7, 0, a, b, c, d);
    uint32_t leaves = a;
    if (!(b & 1u << 5))
        return 0;
    const uint32_t wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    if ((b & wanted) != wanted || !(c & 1u << 11) || (enabled_state() & 0xe6) != 0xe6)
        return 1;
    if (!leaves)
        return 2;
    __cpuid_count(7, 1, a, b, c, d);
    return a & 1u << 5 ? 3 : 2;
}

static int level(void) {
    static atomic_int known = -1;
    int found = atomic_load(&known);
    if (found < 0)
        atomic_store(&known, found = level_of_cpu());
    return found;
}
#endif

static const struct kernels *kernels_of(int set) {
#if defined(__x86_64__)
    if (set == AVX512 && level() >= 2)
        return level() == 3 ? &fedtune_avx512_bf16 : &fedtune_avx512;
    if (set == AVX2 && level() >= 1)
        return &fedtune_avx2;
#endif
    return set == PORTABLE ? &fedtune_portable : NULL;
}

/* Whether this CPU has an instruction set. */
EXPORTED int fedtune_supports(int set) { return kernels_of(set) != NULL; }

/* Whether `bytes` are exactly a * b * c * d, without overflow. */
static int is_product(int64_t bytes, int64_t a, int64_t b, int64_t c, int64_t d) {
    int64_t product;
    return !__builtin_mul_overflow(a, b, &product) && !__builtin_mul_overflow(product, c, &product) &&
           !__builtin_mul_overflow(product, d, &product) && product == bytes;
}

static int fits(const struct fedtune_weights *w) {
    static const int64_t code_bytes[KINDS] = {256, 256, 512, 1024}, scale_bytes[KINDS] = {32, 64, 0, 0}, base_floats[KINDS] = {2, 2, BLOCK, 0};
    if (w->kind < 0 || w->kind >= KINDS || w->n_in < 1 || w->n_in > MOST_COLUMNS || w->n_out < 1 || w->n_out > INT64_MAX - BLOCK)
        return 0;
    int64_t groups = groups_of(w->n_in), blocks = (w->n_out + BLOCK - 1) / BLOCK;
    return w->codes && is_product(w->codes_bytes, blocks, groups, code_bytes[w->kind], 1) &&
           is_product(w->scales_bytes, blocks, groups, scale_bytes[w->kind], 1) && (w->scales || !w->scales_bytes) &&
           is_product(w->base_bytes, blocks, base_floats[w->kind], sizeof(float), 1) && (w->base || !w->base_bytes) &&
           (w->bias ? is_product(w->bias_bytes, w->n_out, sizeof(float), 1, 1) : !w->bias_bytes);
}

struct job {
    const struct fedtune_weights *w;
    const struct kernels *kernels;
    const float *x;
    float *y;
    uint8_t *codes;
    struct columns *groups;
    int64_t rows, groups_a_row, bytes_a_row; /* bytes of the rounded activations */
};

static void round_rows(void *argument, int64_t first, int64_t end) {
    const struct job *job = argument;
    round_row *run = job->w->kind == BF16 ? job->kernels->to_bf16 : job->kernels->to_int8;
    for (int64_t i = first; i < end; i++)
        run(job->x + i * job->w->n_in, job->w->n_in, job->codes + i * job->bytes_a_row, job->groups ? job->groups + i * job->groups_a_row : NULL);
}

static void multiply_blocks(void *argument, int64_t first, int64_t end) {
    const struct job *job = argument;
    const struct fedtune_weights *w = job->w;
    float out[TILE * BLOCK];
    for (int64_t from = 0; from < job->rows; from += CACHED_ROWS) { /* few enough rows of x to stay in the cache while blocks pass */
        int64_t to = job->rows - from < CACHED_ROWS ? job->rows : from + CACHED_ROWS;
        for (int64_t block = first; block < end; block++) {
            int64_t n = w->n_out - block * BLOCK < BLOCK ? w->n_out - block * BLOCK : BLOCK;
            for (int64_t row = from; row < to; row += TILE) {
                int rows = to - row < TILE ? (int)(to - row) : TILE;
                job->kernels->tiles[w->kind](w, block, job->codes + row * job->bytes_a_row,
                                             job->groups ? job->groups + row * job->groups_a_row : NULL, rows, out);
                for (int i = 0; i < rows; i++) {
                    float *y = job->y + (row + i) * w->n_out + block * BLOCK;
                    for (int64_t r = 0; r < n; r++)
                        y[r] = w->bias ? out[i * BLOCK + r] + w->bias[block * BLOCK + r] : out[i * BLOCK + r];
                }
            }
        }
    }
}

/* y [rows, n_out] = x [rows, n_in] Wᵀ + b, on at most `threads` threads, this one included. Returns one of FINE .. NO_SUCH_SET. */
EXPORTED int fedtune_multiply(const struct fedtune_weights *w, int set, int threads, int64_t rows, const float *x, int64_t x_bytes, float *y,
                              int64_t y_bytes) {
    const struct kernels *kernels = kernels_of(set);
    if (!kernels)
        return NO_SUCH_SET;
    if (!fits(w) || rows < 1 || threads < 1 || !x || !y || !is_product(x_bytes, rows, w->n_in, sizeof(float), 1) ||
        !is_product(y_bytes, rows, w->n_out, sizeof(float), 1))
        return BAD_SIZE;
    int64_t groups = groups_of(w->n_in), blocks = (w->n_out + BLOCK - 1) / BLOCK, code = w->kind == BF16 ? 2 : 1;
    struct job job = {.w = w, .kernels = kernels, .x = x, .y = y, .rows = rows, .groups_a_row = groups, .bytes_a_row = groups * GROUP * code};
    int64_t codes_bytes, groups_bytes, bytes;
    if (__builtin_mul_overflow(rows, job.bytes_a_row, &codes_bytes) ||
        __builtin_mul_overflow(rows, w->kind == BF16 ? 0 : groups * (int64_t)sizeof(struct columns), &groups_bytes) ||
        __builtin_add_overflow(codes_bytes, groups_bytes, &bytes) || bytes > INT64_MAX - 64)
        return NO_MEMORY;
    job.codes = aligned_alloc(64, ((size_t)bytes + 63) / 64 * 64);
    if (!job.codes)
        return NO_MEMORY;
    if (groups_bytes)
        job.groups = (struct columns *)(job.codes + codes_bytes); /* whole multiples of 32 bytes come before */
    fedtune_pool_run(rows > FEW ? threads : 1, rows, rows > 8 * FEW ? 8 : FEW, round_rows, &job);
    int64_t step = blocks / (8 * (int64_t)threads);
    fedtune_pool_run(threads, blocks, step < 1 ? 1 : step, multiply_blocks, &job);
    free(job.codes);
    return FINE;
}
