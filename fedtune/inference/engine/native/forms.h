/* Defines NAME, which calls a product for at most AT_ONCE rows at a time, with their number as a constant, so that the sums stay in
 * registers. */
#define FORMS(NAME, TARGET, TYPE, ...)                                                                                                     \
    TARGET static void NAME(const struct fedtune_weights *w, int64_t block, const void *codes, const struct columns *xg, int rows,        \
                            float *out) {                                                                                                  \
        const int64_t groups = groups_of(w->n_in);                                                                                         \
        const TYPE *x = codes;                                                                                                             \
        for (; rows > 0; rows -= AT_ONCE, x += AT_ONCE * groups * GROUP, xg = xg ? xg + AT_ONCE * groups : xg, out += AT_ONCE * BLOCK)      \
            switch (rows) {                                                                                                                \
            case 1: __VA_ARGS__(1); break;                                                                                                 \
            case 2: __VA_ARGS__(2); break;                                                                                                 \
            case 3: __VA_ARGS__(3); break;                                                                                                 \
            default: __VA_ARGS__(4);                                                                                                       \
            }                                                                                                                              \
    }
