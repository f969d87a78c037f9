/* The product with plain float weights; included after rows.h, with its definitions. An output's sum has one order: that of its columns. */
enum { OUTPUTS = 4, ROWS_TOGETHER = LANES == 16 ? 4 : 2 }; /* whose sums fit in the registers */

static void copy_row(const float *x, int64_t n_in, void *codes, struct columns *groups) {
    (void)groups;
    memcpy(codes, x, (size_t)n_in * sizeof *x);
}

/* Adds n <= LANES columns. n is a constant except for the last columns. */
SMALL void plain_columns(vec sums[ROWS_TOGETHER][OUTPUTS], const float *w, int64_t n_in, const int outputs, const float *x, int64_t stride,
                         const int rows, int64_t n) {
    vec own[OUTPUTS];
    for (int k = 0; k < outputs; k++)
        own[k] = load_upto(w + k * n_in, n);
    for (int i = 0; i < rows; i++) {
        vec v = load_upto(x + i * stride, n);
        for (int k = 0; k < outputs; k++)
            sums[i][k] = fused(own[k], v, sums[i][k]);
    }
}

SMALL void plain_sums(const float *w, int64_t n_in, const int outputs, const float *x, int64_t stride, const int rows, float *out,
                      int64_t out_stride) {
    vec sums[ROWS_TOGETHER][OUTPUTS];
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < outputs; k++)
            sums[i][k] = (vec){0};
    int64_t c = 0;
    for (; c + LANES <= n_in; c += LANES)
        plain_columns(sums, w + c, n_in, outputs, x + c, stride, rows, LANES);
    if (c < n_in)
        plain_columns(sums, w + c, n_in, outputs, x + c, stride, rows, n_in - c);
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < outputs; k++)
            out[i * out_stride + k] = sum_of_lanes(sums[i][k]);
}

CODE static void plain_tile(const struct fedtune_weights *w, int64_t block, int blocks, int64_t next, const void *codes, const struct columns *xg,
                            int rows, float *out, int64_t out_stride) {
    const int64_t n_in = w->n_in, stride = groups_of(n_in) * GROUP;
    const float *weights = (const float *)w->codes + block * BLOCK * n_in;
    const int outputs = (int)smaller(blocks * BLOCK, w->n_out - block * BLOCK);
    (void)xg, (void)next;
    for (int k = 0; k < outputs; k += OUTPUTS)
        for (int i = 0; i < rows; i += ROWS_TOGETHER) {
            const float *own = weights + k * n_in, *x = (const float *)codes + i * stride;
            if (outputs - k < OUTPUTS) {
                for (int one = k; one < outputs; one++)
                    for (int row = i; row < rows && row < i + ROWS_TOGETHER; row++)
                        plain_sums(weights + one * n_in, n_in, 1, (const float *)codes + row * stride, stride, 1, out + row * out_stride + one,
                                   out_stride);
            } else if (rows - i >= ROWS_TOGETHER) {
                plain_sums(own, n_in, OUTPUTS, x, stride, ROWS_TOGETHER, out + i * out_stride + k, out_stride);
            } else {
                for (int row = i; row < rows; row++)
                    plain_sums(own, n_in, OUTPUTS, (const float *)codes + row * stride, stride, 1, out + row * out_stride + k, out_stride);
            }
        }
}
