/* Runs every kernel on buffers of exactly the needed size, for the sanitizers. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

int fedtune_multiply(const struct fedtune_weights *w, int set, int threads, int64_t rows, const float *x, int64_t x_bytes, float *y,
                     int64_t y_bytes);
int fedtune_supports(int set);

static void *filled(int64_t bytes, int floats) {
    uint8_t *p = malloc((size_t)(bytes ? bytes : 1));
    for (int64_t i = 0; i < bytes; i++)
        p[i] = (uint8_t)rand();
    for (int64_t i = 0; floats && i < bytes / 4; i++) {
        static const float special[] = {0.0f, 1e-40f, 3e38f, -1e6f, 1e-31f};
        float value = rand() % 50 ? (float)rand() / (float)RAND_MAX - 0.5f : special[rand() % 5];
        memcpy(p + 4 * i, &value, 4);
    }
    return p;
}

int main(void) {
    static const int64_t sizes[][2] = {{1, 1}, {1, 33}, {15, 31}, {16, 32}, {17, 64}, {37, 45}, {129, 290}, {700, 65}, {33, 1056}};
    static const int64_t codes[] = {256, 256, 512, 1024, 0}, scales[] = {32, 64, 0, 0, 0}, base[] = {2, 2, 16, 0, 0};
    int ran = 0;
    for (int set = 0; set < SETS; set++)
        for (int kind = 0; kind < KINDS && fedtune_supports(set); kind++)
            for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++)
                for (int64_t rows = 1; rows < 260; rows = rows * 2 + 1) {
                    int64_t n = sizes[i][0], k = sizes[i][1], blocks = (n + 15) / 16, groups = groups_of(k);
                    struct fedtune_weights w = {kind, k, n, 0, kind == FP32 ? n * k * 4 : blocks * groups * codes[kind], 0, blocks * groups * scales[kind], 0,
                                                blocks * base[kind] * 4, 0, rows % 3 ? n * 4 : 0};
                    w.codes = filled(w.codes_bytes, 0), w.scales = filled(w.scales_bytes, 0), w.base = filled(w.base_bytes, 1);
                    float *bias = filled(n * 4, 1), *x = filled(rows * k * 4, 1), *y = filled(rows * n * 4, 1);
                    w.bias = w.bias_bytes ? bias : NULL;
                    if (fedtune_multiply(&w, set, 1 + ran % 3, rows, x, rows * k * 4, y, rows * n * 4))
                        return 1;
                    if (!fedtune_multiply(&w, set, 1, rows + 1, x, rows * k * 4, y, rows * n * 4))
                        return 2;
                    for (int64_t wrong = 0; wrong < 3; wrong++) { /* sizes whose products do not fit 64 bits */
                        struct fedtune_weights bad = w;
                        if (wrong == 0)
                            bad.n_out = INT64_MAX;
                        else if (wrong == 1)
                            bad.n_in = INT64_MAX;
                        else
                            bad.n_out = INT64_C(1) << 58;
                        if (!fedtune_multiply(&bad, set, 1, wrong == 2 ? INT64_MAX : rows, x, rows * k * 4, y, rows * n * 4))
                            return 3;
                    }
                    free((void *)w.codes), free((void *)w.scales), free((void *)w.base), free(bias), free(x), free(y);
                    ran++;
                }
    printf("%d\n", ran);
    return 0;
}
