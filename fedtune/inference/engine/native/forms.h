/* Defines a `tile` function. The last argument is a macro (rows, blocks, first block) that computes up to AT_ONCE rows. Rows and blocks are
 * constants, so that the sums stay in registers. From FEWEST rows on it computes TOGETHER blocks at once. With fewer rows the memory is the limit,
 * and is read faster one block at a time. */
#define FORMS(NAME, TARGET, TYPE, FEWEST, ...)                                                                                             \
    TARGET static void NAME(const struct fedtune_weights *w, int64_t block, int blocks, int64_t next, const void *codes,                   \
                            const struct columns *columns, int all_rows, float *y, int64_t stride) {                                       \
        const int64_t groups = groups_of(w->n_in);                                                                                         \
        const int wholes = all_rows / AT_ONCE;                                                                                             \
        (void)next, (void)wholes; /* only some instruction sets prefetch */                                                                \
        for (; blocks > 0; blocks -= TOGETHER, block += TOGETHER, y += TOGETHER * BLOCK) {                                                 \
            const TYPE *x = codes;                                                                                                         \
            const struct columns *xg = columns;                                                                                            \
            for (int at = 0; at * AT_ONCE < all_rows; at++, x += AT_ONCE * groups * GROUP) {                                               \
                const int rows = all_rows - at * AT_ONCE;                                                                                  \
                float *out = y + at * AT_ONCE * stride;                                                                                    \
                if (all_rows >= FEWEST && rows >= AT_ONCE && blocks >= TOGETHER)                                                           \
                    __VA_ARGS__(AT_ONCE, TOGETHER, block);                                                                                 \
                else                                                                                                                       \
                    for (int b = 0; b < TOGETHER && b < blocks; b++, out += BLOCK)                                                         \
                        switch (rows) {                                                                                                    \
                        case 1: __VA_ARGS__(1, 1, block + b); break;                                                                       \
                        case 2: __VA_ARGS__(2, 1, block + b); break;                                                                       \
                        case 3: __VA_ARGS__(3, 1, block + b); break;                                                                       \
                        default: if (TOGETHER > 1) __VA_ARGS__(AT_ONCE, 1, block + b);                                                     \
                        }                                                                                                                  \
                xg = xg ? xg + AT_ONCE * groups : xg;                                                                                      \
            }                                                                                                                              \
        }                                                                                                                                  \
    }
