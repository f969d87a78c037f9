/* What a decoder does beside its products: norms, rotations, activations, attention, adapters. Included once for each instruction set, which defines
 *
 *   CODE    attributes of every function
 *   LANES   floats of a vector
 *   fused(a, b, c)   a * b + c of vectors, rounded once if the CPU can
 *   larger_of(a, b), smaller_of(a, b)  of two vectors; b where either is NaN
 *   sum_of_lanes(v)  the sum of a vector's floats, in a fixed order
 *   ints_of_bytes(p), ints_of_halves(p)  LANES numbers of 8 or 16 bits, without a sign, as a vector of 32-bit integers
 *   most_of_lanes(v)  the largest of a vector's floats
 *   sums_of_lanes(v)  the sums of LANES vectors, each in a fixed order
 *
 * The order of all sums depends on sizes and positions only, so that a row's result does not depend on the other rows of a pass.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t ints __attribute__((vector_size(LANES * sizeof(float))));
typedef uint16_t shorts __attribute__((vector_size(LANES * sizeof(uint16_t))));

#define SMALL static inline __attribute__((always_inline)) CODE

SMALL vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

SMALL void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

SMALL vec load_some(const float *p, int64_t n) { /* the first n < LANES lanes, then zeros */
    vec v = {0};
    memcpy(&v, p, (size_t)n * sizeof *p);
    return v;
}

SMALL vec load_upto(const float *p, int64_t n) { return n < LANES ? load_some(p, n) : load(p); }

SMALL void store_some(float *p, vec v, int64_t n) { memcpy(p, &v, (size_t)n * sizeof *p); }

SMALL void store_upto(float *p, vec v, int64_t n) {
    if (n < LANES)
        store_some(p, v, n);
    else
        store(p, v);
}

SMALL vec all(float x) { return x - (vec){0}; } /* x in all lanes; adding zeros would change -0 */

SMALL vec choose(ints mask, vec yes, vec no) { return (vec)(((ints)yes & mask) | ((ints)no & ~mask)); }

SMALL ints lanes(void) { /* their numbers */
    ints v;
    for (int k = 0; k < LANES; k++)
        v[k] = k;
    return v;
}

/* exp(x) to 2 units in the last place; x is limited to -87 .. 88, and NaN stays. Cephes' polynomial. */
SMALL vec exp_of(vec x) {
    const vec zero = {0};
    x = smaller_of(zero + 88.0f, larger_of(zero - 87.0f, x));
    vec shifted = fused(x, zero + 1.44269504f, zero + 12582912.0f); /* rounds to the nearest */
    vec n = shifted - 12582912.0f;
    vec r = fused(n, zero - 0.693359375f, x);
    r = fused(n, zero + 2.12194440e-4f, r);
    vec p = zero + 1.9875691500e-4f;
    p = fused(p, r, zero + 1.3981999507e-3f);
    p = fused(p, r, zero + 8.3334519073e-3f);
    p = fused(p, r, zero + 4.1665795894e-2f);
    p = fused(p, r, zero + 1.6666665459e-1f);
    p = fused(p, r, zero + 5.0000001201e-1f);
    p = fused(p, r * r, r + 1.0f);
    return p * (vec)(((ints)shifted - 0x4b400000 + 127) << 23);
}

SMALL vec tanh_of(vec x) { return 1.0f - 2.0f / (exp_of(x + x) + 1.0f); }

SMALL vec silu_of(vec x) { return x / (exp_of(-x) + 1.0f); }

SMALL vec gelu_of(vec x) {
    vec cube = x * x * x;
    vec inner = 0.797884561f * fused(cube, (vec){0} + 0.044715f, x);
    return 0.5f * x * (tanh_of(inner) + 1.0f);
}

/* out = x / sqrt(mean(x^2) + eps) * weight; out may be x. */
CODE static void norm(const float *x, const float *weight, float *out, int64_t n, float eps) {
    vec sums[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int k = 0; k < 4; k++) {
            vec v = load(x + i + k * LANES);
            sums[k] = fused(v, v, sums[k]);
        }
    for (; i < n; i += LANES) {
        vec v = n - i < LANES ? load_some(x + i, n - i) : load(x + i);
        sums[0] = fused(v, v, sums[0]);
    }
    float factor = 1.0f / sqrtf(sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)n + eps);
    for (i = 0; i + LANES <= n; i += LANES)
        store(out + i, load(x + i) * load(weight + i) * factor);
    if (i < n)
        store_some(out + i, load_some(x + i, n - i) * load_some(weight + i, n - i) * factor, n - i);
}

/* to += x. */
CODE static void add(float *to, const float *x, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(to + i, load(to + i) + load(x + i));
    for (; i < n; i++)
        to[i] += x[i];
}

SMALL vec activated(vec gate, int gelu) { return gelu ? gelu_of(gate) : silu_of(gate); }

/* out = act(gate) * up; out may be gate. */
CODE static void activate(const float *gate, const float *up, float *out, int64_t n, int gelu) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(out + i, activated(load(gate + i), gelu) * load(up + i));
    if (i < n)
        store_some(out + i, activated(load_some(gate + i, n - i), gelu) * load_some(up + i, n - i), n - i);
}

/* x = cap tanh(x / cap) */
CODE static void cap(float *x, int64_t n, float most) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(x + i, most * tanh_of(load(x + i) / most));
    if (i < n)
        store_some(x + i, most * tanh_of(load_some(x + i, n - i) / most), n - i);
}

/* Multiply `pairs` complex numbers by those of `turns`, and by a factor. */
CODE static void rotate(float *x, const float *turns, int64_t pairs, float factor) {
    for (int64_t i = 0; i < pairs; i++) {
        float a = x[2 * i], b = x[2 * i + 1], c = turns[2 * i], s = turns[2 * i + 1];
        x[2 * i] = (a * c - b * s) * factor;
        x[2 * i + 1] = (a * s + b * c) * factor;
    }
}

/* Floats' nearest bfloat16s, as bf16_of rounds them. */
CODE static void halve(const float *x, int64_t n, uint16_t *out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        ints bits = (ints)load(x + i), is_nan = (bits & 0x7fffffff) > 0x7f800000;
        ints rounded = bits + 0x7fff + (bits >> 16 & 1); /* only a NaN could overflow */
        shorts half = __builtin_convertvector(((rounded & ~is_nan) | (is_nan & 0x7fc00000)) >> 16, shorts);
        memcpy(out + i, &half, sizeof half);
    }
    for (; i < n; i++)
        out[i] = bf16_of(x[i]);
}

static void to_bf16(const float *x, int64_t n_in, void *codes, struct columns *groups) {
    (void)groups;
    halve(x, n_in, codes);
    memset((uint16_t *)codes + n_in, 0, (size_t)(groups_of(n_in) * GROUP - n_in) * sizeof(uint16_t));
}

#include "attend.h"

enum { X_ROWS = 2, RANKS = 4 }; /* of a tile of an adapter's products, whose sums fit in 16 registers */

/* out[k][r] = x[k] a[r]; `rows` and `ranks` are constants. */
SMALL void shrink_tile(const float *x, int64_t x_stride, const int rows, const float *a, int64_t n_in, const int ranks, float *out,
                       int64_t out_stride) {
    vec sums[X_ROWS][RANKS] = {{{0}}};
    int64_t i = 0;
    for (; i + LANES <= n_in; i += LANES)
        for (int r = 0; r < ranks; r++)
            for (int k = 0; k < rows; k++)
                sums[k][r] = fused(load(x + k * x_stride + i), load(a + r * n_in + i), sums[k][r]);
    for (int r = 0; r < ranks; r++)
        for (int k = 0; k < rows; k++) {
            if (i < n_in)
                sums[k][r] = fused(load_some(x + k * x_stride + i, n_in - i), load_some(a + r * n_in + i, n_in - i), sums[k][r]);
            out[k * out_stride + r] = sum_of_lanes(sums[k][r]);
        }
}

/* out [rows, ranks] = x [rows, n_in] aᵀ; a [ranks, n_in]. */
CODE static void shrink(const float *x, int64_t x_stride, int64_t rows, const float *a, int64_t n_in, int64_t ranks, float *out,
                        int64_t out_stride) {
    for (; rows > 0; rows -= X_ROWS, x += X_ROWS * x_stride, out += X_ROWS * out_stride)
        for (int64_t r = 0; r < ranks;) {
            const int many = r + RANKS <= ranks;
            if (rows < X_ROWS && many)
                shrink_tile(x, x_stride, 1, a + r * n_in, n_in, RANKS, out + r, out_stride);
            else if (rows < X_ROWS)
                shrink_tile(x, x_stride, 1, a + r * n_in, n_in, 1, out + r, out_stride);
            else if (many)
                shrink_tile(x, x_stride, X_ROWS, a + r * n_in, n_in, RANKS, out + r, out_stride);
            else
                shrink_tile(x, x_stride, X_ROWS, a + r * n_in, n_in, 1, out + r, out_stride);
            r += many ? RANKS : 1;
        }
}

/* n <= LANES columns of expand_tile. */
SMALL void expand_lanes(vec factors[X_ROWS][RANKS], const int rows, const float *b, int64_t b_stride, const int ranks, float *y, int64_t y_stride,
                        int64_t n) {
    vec sums[X_ROWS];
    for (int k = 0; k < rows; k++)
        sums[k] = load_upto(y + k * y_stride, n);
    for (int r = 0; r < ranks; r++)
        for (int k = 0; k < rows; k++)
            sums[k] = fused(factors[k][r], load_upto(b + r * b_stride, n), sums[k]);
    for (int k = 0; k < rows; k++)
        store_upto(y + k * y_stride, sums[k], n);
}

/* y[k] += x[k] b; `rows` and `ranks` are constants. */
SMALL void expand_tile(const float *x, int64_t x_stride, const int rows, const float *b, int64_t b_stride, const int ranks, float *y,
                       int64_t y_stride, int64_t n) {
    vec factors[X_ROWS][RANKS];
    for (int k = 0; k < rows; k++)
        for (int r = 0; r < ranks; r++)
            factors[k][r] = (vec){0} + x[k * x_stride + r];
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        expand_lanes(factors, rows, b + i, b_stride, ranks, y + i, y_stride, LANES);
    if (i < n)
        expand_lanes(factors, rows, b + i, b_stride, ranks, y + i, y_stride, n - i);
}

/* y [rows, n] += x [rows, ranks] b; b [ranks, n]. An output's ranks are added one after the other. */
CODE static void expand(const float *x, int64_t x_stride, int64_t rows, const float *b, int64_t b_stride, int64_t ranks, float *y,
                        int64_t y_stride, int64_t n) {
    for (; rows > 0; rows -= X_ROWS, x += X_ROWS * x_stride, y += X_ROWS * y_stride)
        for (int64_t r = 0; r < ranks;) {
            const int many = r + RANKS <= ranks;
            if (rows < X_ROWS && many)
                expand_tile(x + r, x_stride, 1, b + r * b_stride, b_stride, RANKS, y, y_stride, n);
            else if (rows < X_ROWS)
                expand_tile(x + r, x_stride, 1, b + r * b_stride, b_stride, 1, y, y_stride, n);
            else if (many)
                expand_tile(x + r, x_stride, X_ROWS, b + r * b_stride, b_stride, RANKS, y, y_stride, n);
            else
                expand_tile(x + r, x_stride, X_ROWS, b + r * b_stride, b_stride, 1, y, y_stride, n);
            r += many ? RANKS : 1;
        }
}

SMALL int64_t most_likely(const float *x, int64_t n, int64_t but, float *value) { /* the first of equals, other than `but`; 0 if all are NaN */
    vec top = (vec){0} - INFINITY;
    int64_t i = 0, found = 0;
    *value = -INFINITY;
    for (; i + LANES <= n; i += LANES) {
        vec v = load(x + i);
        if (but >= i && but < i + LANES)
            v[but - i] = -INFINITY;
        top = larger_of(v, top);
    }
    for (int k = 0; k < LANES; k++)
        *value = top[k] > *value ? top[k] : *value;
    for (; i < n; i++)
        *value = i != but && x[i] > *value ? x[i] : *value;
    while (found < n - 1 && (found == but || x[found] != *value))
        found++;
    return found < n && x[found] == *value ? found : 0;
}

/* The two most likely of n >= 2 tokens by their logits x, and their chances: the softmax of `sharpness` x. */
CODE static void two_best(const float *x, int64_t n, float sharpness, int64_t *tokens, float *chances) {
    float best, second;
    tokens[0] = most_likely(x, n, -1, &best);
    tokens[1] = most_likely(x, n, tokens[0], &second);
    vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        sums = sums + exp_of((load(x + i) - best) * sharpness);
    float total = sum_of_lanes(sums);
    for (; i < n; i++)
        total += exp_of((vec){0} + (x[i] - best) * sharpness)[0];
    chances[0] = 1.0f / total;
    chances[1] = exp_of((vec){0} + (second - best) * sharpness)[0] / total;
}

static const struct operations operations = {norm, add, activate, cap, rotate, halve, attend, shrink, expand, two_best};
