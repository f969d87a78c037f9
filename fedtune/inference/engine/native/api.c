/* The functions that Python calls. */
#include <stddef.h>
#include <stdlib.h>

#include "kernels.h"

#ifndef SOURCES
#define SOURCES "unknown"
#endif


/* The digest of the sources that this library was built from. */
EXPORTED const char *fedtune_sources(void) { return SOURCES; }

/* Whether this CPU has an instruction set. */
EXPORTED int fedtune_supports(int set) { return fedtune_kernels_of(set) != NULL; }

/* y [rows, n_out] = x [rows, n_in] Wᵀ + b, on at most `threads` threads, this one included. Returns FINE, BAD_SIZE, NO_MEMORY
 * or NO_SUCH_SET. */
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

/* A pass through a decoder: see pass.c. Returns as fedtune_multiply; if the result is not FINE, nothing has changed. */
EXPORTED int fedtune_run(const struct fedtune_decoder *decoder, const struct fedtune_pass *pass, int set, int threads) {
    const struct kernels *kernels = fedtune_kernels_of(set);
    return kernels ? fedtune_pass_run(decoder, pass, kernels, threads) : NO_SUCH_SET;
}

/* A pass, then draft tokens: see draft.c. Returns as fedtune_multiply. */
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
