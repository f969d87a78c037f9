/* What a decoder does beside its products: norms, rotations, activations, attention, adapters. Included once for each instruction set, which defines
 *
 *   CODE    attributes of every function
 *   LANES   floats of a vector
 *   fused(a, b, c)   a * b + c of vectors, rounded once if the CPU can
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

SMALL vec choose(ints mask, vec yes, vec no) { return (vec)(((ints)yes & mask) | ((ints)no & ~mask)); }

/* exp(x) to 2 units in the last place; x is limited to -87 .. 88, and NaN stays. Cephes' polynomial. */
SMALL vec exp_of(vec x) {
    const vec zero = {0};
    x = choose(x < -87.0f, zero - 87.0f, x);
    x = choose(x > 88.0f, zero + 88.0f, x);
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

SMALL void floats_of_halves(const uint16_t *from, float *to, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(to + i, (vec)((ints)ints_of_halves(from + i) << 16));
    for (; i < n; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, sizeof bits);
    }
}

/* The softmax of one query over tokens first .. count-1 of a tile. `most`, `total` and out [width] hold that over the tiles before. */
SMALL void attend_tile(const struct attention *a, const float *query, const float *const *keys, const float *const *values,
                       const int64_t width, int first, int count, float *most, float *total, float *out) {
    const int64_t whole = width / LANES * LANES;
    float scores[TOKENS];
    vec q[MOST_WIDTH / LANES];
    for (int64_t i = 0; i < width; i += LANES)
        q[i / LANES] = load_upto(query + i, width - i);
    vec top = (vec){0} + *most;
    for (int t = first; t < count; t += LANES) { /* sums of LANES tokens at a time; the last ones may be the first of them again */
        vec products[LANES];
        for (int k = 0; k < LANES; k++) {
            const float *key = keys[t + k < count ? t + k : t];
            vec one = {0}, two = {0};
            int64_t i = 0;
            for (; i + 2 * LANES <= whole; i += 2 * LANES) {
                one = fused(q[i / LANES], load(key + i), one);
                two = fused(q[i / LANES + 1], load(key + i + LANES), two);
            }
            for (; i < width; i += LANES)
                one = fused(q[i / LANES], load_upto(key + i, width - i), one);
            products[k] = one + two;
        }
        vec sums = sums_of_lanes(products);
        if (a->cap != 0)
            sums = a->cap * tanh_of(sums / a->cap);
        top = choose(sums > top, sums, top);
        store_upto(scores + t, sums, count - t);
    }
    const float highest = most_of_lanes(top);
    vec sum = {0};
    for (int t = first; t < count; t += LANES) {
        store_upto(scores + t, exp_of(load_upto(scores + t, count - t) - highest), count - t);
        sum = sum + load_upto(scores + t, count - t); /* zeros beyond count */
    }
    const float old = highest != *most ? exp_of((vec){0} + (*most - highest))[0] : 1.0f;
    *most = highest;
    *total = *total * old + sum_of_lanes(sum);
    int64_t i = 0;
    for (; i + 4 * LANES <= whole; i += 4 * LANES) {
        vec o[4];
        for (int k = 0; k < 4; k++)
            o[k] = load(out + i + k * LANES) * old;
        for (int t = first; t < count; t++)
            for (int k = 0; k < 4; k++)
                o[k] = fused((vec){0} + scores[t], load(values[t] + i + k * LANES), o[k]);
        for (int k = 0; k < 4; k++)
            store(out + i + k * LANES, o[k]);
    }
    for (; i < whole; i += LANES) {
        vec o = load(out + i) * old;
        for (int t = first; t < count; t++)
            o = fused((vec){0} + scores[t], load(values[t] + i), o);
        store(out + i, o);
    }
    for (; i < width; i++) {
        float o = out[i] * old;
        for (int t = first; t < count; t++)
            o += scores[t] * values[t][i];
        out[i] = o;
    }
}

/* The same with a constant number of channels where it is common, so that the query stays in registers. */
CODE static void attend_tile_of(const struct attention *a, const float *query, const float *const *keys, const float *const *values, int first,
                                int count, float *most, float *total, float *out) {
    if (a->width == 64)
        attend_tile(a, query, keys, values, 64, first, count, most, total, out);
    else if (a->width == 128)
        attend_tile(a, query, keys, values, 128, first, count, most, total, out);
    else
        attend_tile(a, query, keys, values, a->width, first, count, most, total, out);
}

/* float16 to float32: the exponents' offsets differ by 112, and numbers below 2^-14 come out right, too. There are no infinities. */
SMALL void floats_of_float16(const uint16_t *from, float *to, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        uint16_t last[LANES] = {0};
        if (n - i < LANES)
            memcpy(last, from + i, sizeof(uint16_t) * (size_t)(n - i));
        ints bits = (ints)ints_of_halves(n - i < LANES ? last : from + i);
        vec size = (vec)((bits & 0x7fff) << 13) * 0x1p112f;
        size = (vec)((ints)size | (bits & 0x8000) << 16);
        store_upto(to + i, size, n - i);
    }
}

SMALL vec load_codes(const uint8_t *p, int64_t n, int shift, int mask) {
    uint8_t last[LANES] = {0};
    if (n < LANES)
        memcpy(last, p, (size_t)n);
    return __builtin_convertvector((ints)ints_of_bytes(n < LANES ? last : p) >> shift & mask, vec);
}

/* Tokens token .. token + count - 1 of one group, from codes. */
SMALL void decode(const struct codes *c, int values, int64_t token, int count, int64_t width, float *to) {
    const int64_t group = token / c->group, rows = c->group * c->bits / 8, parts = (width + c->values_together - 1) / c->values_together;
    const int mask = (1 << c->bits) - 1;
    float lows[MOST_WIDTH], scales[MOST_WIDTH];
    if (!values) {
        floats_of_float16(c->key_lows + group * width, lows, width);
        floats_of_float16(c->key_scales + group * width, scales, width);
    }
    for (int t = 0; t < count; t++, to += width) {
        const int64_t in_group = (token + t) % c->group;
        const int shift = (int)(in_group / rows * c->bits);
        const uint8_t *codes = (values ? c->values : c->keys) + (group * rows + in_group % rows) * width;
        if (values) {
            floats_of_float16(c->value_lows + (token + t) * parts, lows, parts);
            floats_of_float16(c->value_scales + (token + t) * parts, scales, parts);
        }
        const int64_t step = values ? c->values_together : width;
        for (int64_t from = 0, part = 0; from < width; from += step, part++) {
            const int64_t end = from + step < width ? from + step : width;
            for (int64_t i = from; i < end; i += LANES) {
                const int64_t n = end - i;
                vec code = load_codes(codes + i, n, shift, mask);
                vec scale = values ? (vec){0} + scales[part] : load_upto(scales + i, n), low = values ? (vec){0} + lows[part] : load_upto(lows + i, n);
                vec x = fused(code, scale, low);
                store_upto(to + i, x, n);
            }
        }
    }
}

/* Where the keys (or values) of tokens from .. from + count - 1 are, as floats: in the cache itself, or in `space`, unpacked. Tokens below
 * `coded` are codes. Keys of a ring are rotated by their place, which is `moved` below their position unless they are sinks. */
SMALL void find_tokens(const struct attention *a, int values, int64_t from, int count, int64_t coded, int64_t moved, float *space,
                       const float **found) {
    const void *entries = values ? a->values : a->keys;
    for (int t = 0; t < count; t++) {
        const int64_t at = from + t;
        float *own = space + t * a->width;
        found[t] = own;
        if (at < coded) { /* up to the end of the group */
            const int64_t last = smaller(smaller(coded, from + count), (at / a->codes->group + 1) * a->codes->group);
            decode(a->codes, values, at, (int)(last - at), a->width, own);
            for (; from + t < last - 1; t++)
                found[t + 1] = found[t] + a->width;
            continue;
        }
        const int64_t slot = slot_of(at, a->first, a->blocks, a->block, a->sinks, a->ring);
        if (a->halves)
            floats_of_halves((const uint16_t *)entries + slot * a->token_stride, own, a->width);
        else if (a->ring && !values)
            memcpy(own, (const float *)entries + slot * a->token_stride, (size_t)a->width * sizeof(float));
        else
            found[t] = (const float *)entries + slot * a->token_stride;
        if (a->ring && !values) { /* a token that this row does not see may be beyond both ends */
            const int64_t place = at < a->sinks ? at : smaller(larger(at - moved, 0), a->sinks + a->window - 1);
            rotate(own, a->places + place * a->width, a->width / 2, 1);
        }
    }
}

/* The position of a row in the text. */
SMALL int64_t position_of(const struct attention *a, int64_t row) { return a->length + (row < a->chain ? row : a->forks[row - a->chain] + 1); }

/* Rows row .. row + rows - 1 over their tokens low .. end - 1: tile by tile, in which each row takes what it sees. */
SMALL void attend_range(const struct attention *a, int64_t row, int rows, int64_t low, int64_t end, int is_sinks, float *space, float *most,
                        float *total) {
    const float *keys[TOKENS], *values[TOKENS];
    const int copies = a->halves || a->codes || a->ring, shared = a->shared;
    float *own = space + (copies ? 2 * TOKENS * a->width : 0); /* a fork's key and value */
    for (int64_t tile = low / TOKENS * TOKENS; tile < end; tile += TOKENS) { /* tiles begin at fixed positions */
        const int64_t start = larger(tile, low);
        const int count = (int)(smaller(tile + TOKENS, end) - start);
        int64_t coded = -1, moved = -1; /* those of the tokens found last */
        for (int r = 0; r < rows; r++) {
            const int64_t at = position_of(a, row + r), oldest = is_sinks || !a->window ? 0 : at - a->window + 1;
            const int from = (int)smaller(larger(oldest - start, 0), count), to = (int)smaller(at + 1 - start, count);
            if (from >= to)
                continue;
            const int64_t edge = a->codes ? smaller(larger(at + 1 - a->residual, 0) / a->codes->group * a->codes->group, end) : 0;
            const int64_t shift = a->ring ? larger(at - (a->sinks + a->window - 1), 0) : 0;
            const int64_t now = smaller(larger(edge, start), start + count);
            if (now != coded || shift != moved) {
                find_tokens(a, 0, start, count, now, shift, space, keys);
                find_tokens(a, 1, start, count, now, shift, space + (copies ? TOKENS * a->width : 0), values);
                coded = now, moved = shift;
            }
            const int is_fork = row + r >= a->chain && at < start + count; /* then the last token that it sees is its own */
            const float *chain_key = keys[to - 1], *chain_value = values[to - 1];
            if (is_fork) {
                find_tokens(a, 0, a->length + row + r, 1, 0, 0, own, keys + to - 1);
                find_tokens(a, 1, a->length + row + r, 1, 0, 0, own + (copies ? a->width : 0), values + to - 1);
            }
            for (int h = 0; h < shared; h++)
                attend_tile_of(a, a->q + (row + r) * a->q_stride + h * a->width, keys, values, from, to, most + r * shared + h,
                               total + r * shared + h, a->out + (row + r) * a->out_stride + h * a->width);
            keys[to - 1] = chain_key, values[to - 1] = chain_value;
        }
    }
}

CODE static void attend(const struct attention *a, int64_t row, int rows) {
    float most[ROWS_AT_ONCE * MOST_SHARED], total[ROWS_AT_ONCE * MOST_SHARED];
    float space[a->halves || a->codes || a->ring ? 2 * (TOKENS + 1) * a->width : 1];
    const int shared = a->shared;
    int64_t end = 0, first = INT64_MAX;
    for (int r = 0; r < rows; r++) {
        end = larger(end, position_of(a, row + r) + 1), first = smaller(first, position_of(a, row + r));
        memset(a->out + (row + r) * a->out_stride, 0, (size_t)(shared * a->width) * sizeof(float));
        for (int h = 0; h < shared; h++)
            most[r * shared + h] = -INFINITY, total[r * shared + h] = 0;
    }
    const int64_t oldest = a->window ? larger(first - a->window + 1, 0) : 0;
    if (a->ring && a->sinks)
        attend_range(a, row, rows, 0, smaller(a->sinks, end), 1, space, most, total);
    attend_range(a, row, rows, a->ring ? larger(oldest, a->sinks) : oldest, end, 0, space, most, total);
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < shared; h++) {
            float *out = a->out + (row + r) * a->out_stride + h * a->width, share = 1.0f / total[r * shared + h];
            for (int64_t i = 0; i < a->width; i++)
                out[i] *= share;
        }
}

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
        top = choose(v > top, v, top);
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

static const struct operations operations = {norm, add, activate, cap, rotate, attend, shrink, expand, two_best};
