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


/* The digest of the sources that this library was built from. */
EXPORTED const char *fedtune_sources(void) { return SOURCES; }

#if defined(__x86_64__)
static uint64_t enabled_state(void) { /* the registers that the system saves */
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

enum { HAS_AVX2 = 1, HAS_VNNI = 2, HAS_AVX512 = 4, HAS_BF16 = 8 };

/* What the CPU and the system have: AVX2 and FMA; AVX-VNNI; AVX-512 F, DQ, BW, VL and VNNI; AVX-512 BF16. */
static int features_of_cpu(void) {
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
    int wide = (b & wanted) == wanted && c & 1u << 11 && (enabled_state() & 0xe6) == 0xe6;
    a = 0;
    if (leaves)
        __cpuid_count(7, 1, a, b, c, d);
    return HAS_AVX2 | (a & 1u << 4 ? HAS_VNNI : 0) | (wide ? HAS_AVX512 : 0) | (wide && a & 1u << 5 ? HAS_BF16 : 0);
}

static int features(void) {
    static atomic_int known = -1;
    int found = atomic_load(&known);
    if (found < 0)
        atomic_store(&known, found = features_of_cpu());
    return found;
}
#endif

const struct kernels *fedtune_kernels_of(int set) {
#if defined(__x86_64__)
    if (set == AVX512 && features() & HAS_AVX512)
        return features() & HAS_BF16 ? &fedtune_avx512_bf16 : &fedtune_avx512;
#ifdef HAS_AVXVNNI
    if (set == AVXVNNI && features() & HAS_VNNI)
        return &fedtune_avxvnni;
#endif
    if (set == AVX2 && features() & HAS_AVX2)
        return &fedtune_avx2;
#endif
    return set == PORTABLE ? &fedtune_portable : NULL;
}

/* Whether this CPU has an instruction set. */
EXPORTED int fedtune_supports(int set) { return fedtune_kernels_of(set) != NULL; }

/* y [rows, n_out] = x [rows, n_in] Wᵀ + b, on at most `threads` threads, this one included. Returns one of FINE .. NO_SUCH_SET. */
EXPORTED int fedtune_multiply(const struct fedtune_weights *w, int set, int threads, int64_t rows, const float *x, int64_t x_bytes, float *y,
                              int64_t y_bytes) {
    const struct kernels *kernels = fedtune_kernels_of(set);
    if (!kernels)
        return NO_SUCH_SET;
    if (!fedtune_weights_fit(w) || rows < 1 || threads < 1 || !x || !y || !fedtune_is_product(x_bytes, rows, w->n_in, sizeof(float), 1) ||
        !fedtune_is_product(y_bytes, rows, w->n_out, sizeof(float), 1))
        return BAD_SIZE;
    int64_t bytes = fedtune_space_for(w, rows);
    void *space = bytes < 0 ? NULL : aligned_alloc(64, ((size_t)bytes + 63) / 64 * 64);
    if (!space)
        return NO_MEMORY;
    fedtune_product(w, kernels, threads, rows, x, w->n_in, y, space);
    free(space);
    return FINE;
}

/* A pass through a decoder: see pass.c. Returns one of FINE .. NO_SUCH_SET; after another one than FINE nothing has changed. */
EXPORTED int fedtune_run(const struct fedtune_decoder *decoder, const struct fedtune_pass *pass, int set, int threads) {
    const struct kernels *kernels = fedtune_kernels_of(set);
    return kernels ? fedtune_pass_run(decoder, pass, kernels, threads) : NO_SUCH_SET;
}

/* A pass and draft tokens after it: see draft.c. Returns one of FINE .. NO_SUCH_SET. */
EXPORTED int fedtune_guess(const struct fedtune_decoder *decoder, const struct fedtune_pass *pass, struct fedtune_draft *draft, int set,
                           int threads) {
    const struct kernels *kernels = fedtune_kernels_of(set);
    return kernels ? fedtune_draft_run(decoder, pass, draft, kernels, threads) : NO_SUCH_SET;
}

/* The two most likely tokens [rows, 2] of logits [rows, n], n >= 2, and their chances: the softmax of `sharpness` times the logits. */
EXPORTED int fedtune_best(int set, const float *logits, int64_t rows, int64_t n, float sharpness, int64_t *tokens, float *chances) {
    const struct kernels *kernels = fedtune_kernels_of(set);
    if (!kernels)
        return NO_SUCH_SET;
    if (n < 2)
        return BAD_SIZE;
    for (int64_t i = 0; i < rows; i++)
        kernels->operations->two_best(logits + i * n, n, sharpness, tokens + 2 * i, chances + 2 * i);
    return FINE;
}
