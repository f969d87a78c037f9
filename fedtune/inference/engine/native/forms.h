/* A form for each number of rows, so that the sums stay in registers; of TOGETHER blocks at once where there are AT_ONCE rows. */
#define FORMS(NAME, TARGET, TYPE, ...)                                                                                                     \
    TARGET static void NAME(const struct fedtune_weights *w, int64_t first, int blocks, int64_t next, const void *codes,                \
                            const struct columns *xg, int rows, float *y, int64_t stride) {                                                \
        const int64_t groups = groups_of(w->n_in);                                                                                         \
        const int wholes = rows / AT_ONCE;                                                                                                 \
        const TYPE *x = codes;                                                                                                             \
        for (int at = 0; rows > 0; at++, rows -= AT_ONCE, x += AT_ONCE * groups * GROUP, xg = xg ? xg + AT_ONCE * groups : xg, y += AT_ONCE * stride)       \
            for (int b = 0, n; b < blocks; b += n) {                                                                                       \
                const int64_t block = first + b;                                                                                           \
                float *out = y + b * BLOCK;                                                                                                \
                n = rows >= AT_ONCE && blocks - b >= TOGETHER ? TOGETHER : 1;                                                              \
                if (rows >= AT_ONCE && n == TOGETHER) {                                                                                    \
                    __VA_ARGS__(AT_ONCE, TOGETHER);                                                                                        \
                    continue;                                                                                                              \
                }                                                                                                                          \
                switch (rows) {                                                                                                            \
                case 1: __VA_ARGS__(1, 1); break;                                                                                          \
                case 2: __VA_ARGS__(2, 1); break;                                                                                          \
                case 3: __VA_ARGS__(3, 1); break;                                                                                          \
                default: if (TOGETHER > 1) __VA_ARGS__(AT_ONCE, 1);                                                                        \
                }                                                                                                                          \
            }                                                                                                                              \
    }
