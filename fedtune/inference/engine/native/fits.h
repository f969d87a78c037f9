/* What pass.c and fits.c share: the parts of a layer, an adapter and a span. */
#ifndef FEDTUNE_FITS_H
#define FEDTUNE_FITS_H

#include "kernels.h"

/* Whether all parts of a decoder, or of a pass through it, are present and fit each other. */
int fedtune_decoder_fits(const struct fedtune_decoder *d);
int fedtune_pass_fits(const struct fedtune_decoder *d, const struct fedtune_pass *p);

static inline const struct fedtune_weights *linear_of(const struct fedtune_layer *l, int64_t linear) {
    const struct fedtune_weights *all[LINEARS] = {&l->qkv, &l->o, &l->gate_up, &l->down};
    return all[linear];
}

/* The ranks of a linear's pieces together. */
static inline int64_t ranks_of(const struct fedtune_lora *lora, int64_t layer, int64_t linear) {
    int64_t ranks = 0;
    for (int64_t i = lora->starts[layer]; i < lora->starts[layer + 1]; i++)
        ranks += lora->pieces[i].linear == linear ? lora->pieces[i].rank : 0;
    return ranks;
}

/* The newest tokens that a row sees in a layer; 0: all. A ring's sinks count among those of the layer's own window. */
static inline int64_t window_of(const struct fedtune_span *s, const struct fedtune_layer *l) {
    int64_t own = s->ring && l->window ? l->window - s->sinks : l->window;
    return !s->ring || (l->window && own < s->window) ? own : s->window;
}

#endif
