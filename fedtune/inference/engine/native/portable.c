/* The kernels in plain C, for any CPU; the reference of the others. */
#include <stdint.h>
#include <string.h>

#define CODE
#define LANES 4
typedef float four __attribute__((vector_size(16)));

static inline four fused(four a, four b, four c) { return a * b + c; }

typedef int32_t four_ints __attribute__((vector_size(16)));

static inline four larger_of(four a, four b) { return (four)(((four_ints)a & (a > b)) | ((four_ints)b & ~(a > b))); }

static inline four smaller_of(four a, four b) { return (four)(((four_ints)a & (a < b)) | ((four_ints)b & ~(a < b))); }

static inline float sum_of_lanes(four v) { return (v[0] + v[2]) + (v[1] + v[3]); }

static inline four_ints ints_of_bytes(const uint8_t *p) { return (four_ints){p[0], p[1], p[2], p[3]}; }

static inline four_ints ints_of_halves(const uint16_t *p) { return (four_ints){p[0], p[1], p[2], p[3]}; }

static inline float most_of_lanes(four v) {
    float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}

static inline four sums_of_lanes(const four *v) { return (four){sum_of_lanes(v[0]), sum_of_lanes(v[1]), sum_of_lanes(v[2]), sum_of_lanes(v[3])}; }

#include "rows.h"
#include "plain.h"

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float from_bf16(uint16_t half) { return from_bits((uint32_t)half << 16); }

static uint16_t read_u16(const uint8_t *p) {
    uint16_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

static void to_int8(const float *x, int64_t n_in, void *codes, struct columns *groups) {
    int8_t *out = codes;
    for (int64_t at = 0; at < n_in; at += GROUP, out += GROUP, groups++) {
        int n = n_in - at < GROUP ? (int)(n_in - at) : GROUP;
        uint32_t most = 0; /* as an integer, in whose order NaN and infinity are the largest */
        for (int i = 0; i < n; i++) {
            uint32_t bits = to_bits(x[at + i]) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        memset(groups, 0, sizeof *groups);
        memset(out, 0, GROUP);
        if (most >= 0x7f800000) {
            groups->scale = groups->sum = from_bits(0x7fc00000);
        } else if (from_bits(most) >= TINY) {
            float inverse = 127.0f / from_bits(most);
            int32_t total = 0;
            for (int i = 0; i < n; i++) { /* adding 1.5 * 2^23 rounds to the nearest, ties to even */
                out[i] = (int8_t)((int32_t)to_bits(x[at + i] * inverse + 12582912.0f) - 0x4b400000);
                total += out[i];
            }
            groups->scale = from_bits(most) / 127.0f;
            groups->sum = groups->scale * (float)total;
            groups->minus_8 = -8 * total, groups->minus_128 = -128 * total;
        }
    }
}

static void int4(const struct fedtune_weights *w, int64_t block, const int8_t *x, const struct columns *xg, float *out, int wide) {
    const int64_t groups = groups_of(w->n_in);
    const uint8_t *p = w->codes + block * groups * 256, *s = w->scales + block * groups * (wide ? 64 : 32);
    float product[BLOCK] = {0}, shift[BLOCK] = {0};
    for (int64_t g = 0; g < groups; g++, p += 256, x += GROUP, s += wide ? 64 : 32) {
        int32_t dot[BLOCK];
        for (int r = 0; r < BLOCK; r++)
            dot[r] = xg[g].minus_8;
        for (int j = 0; j < 4; j++)
            for (int r = 0; r < BLOCK; r++)
                for (int b = 0; b < 4; b++) {
                    uint8_t both = p[64 * j + 4 * r + b];
                    dot[r] += (both & 15) * x[4 * j + b] + (both >> 4) * x[16 + 4 * j + b];
                }
        for (int r = 0; r < BLOCK; r++) {
            product[r] += (wide ? from_bf16(read_u16(s + 2 * r)) : (float)s[r]) * xg[g].scale * (float)dot[r];
            shift[r] += (wide ? from_bf16(read_u16(s + 32 + 2 * r)) : (float)(int8_t)s[16 + r]) * xg[g].sum;
        }
    }
    for (int r = 0; r < BLOCK; r++)
        out[r] = wide ? product[r] + shift[r] : product[r] * w->base[2 * block] + shift[r] * w->base[2 * block + 1];
}

static void int8(const struct fedtune_weights *w, int64_t block, const int8_t *x, const struct columns *xg, float *out) {
    const int64_t groups = groups_of(w->n_in);
    const uint8_t *p = w->codes + block * groups * 512;
    float product[BLOCK] = {0};
    for (int64_t g = 0; g < groups; g++, p += 512, x += GROUP) {
        int32_t dot[BLOCK];
        for (int r = 0; r < BLOCK; r++)
            dot[r] = xg[g].minus_128;
        for (int j = 0; j < 8; j++)
            for (int r = 0; r < BLOCK; r++)
                for (int b = 0; b < 4; b++)
                    dot[r] += p[64 * j + 4 * r + b] * x[4 * j + b];
        for (int r = 0; r < BLOCK; r++)
            product[r] += xg[g].scale * (float)dot[r];
    }
    for (int r = 0; r < BLOCK; r++)
        out[r] = product[r] * w->base[BLOCK * block + r];
}

static void bf16(const struct fedtune_weights *w, int64_t block, const uint16_t *x, float *out) {
    const int64_t groups = groups_of(w->n_in);
    const uint8_t *p = w->codes + block * groups * 1024;
    float even[BLOCK] = {0}, odd[BLOCK] = {0};
    for (int64_t j = 0; j < groups * GROUP / 2; j++, p += 64)
        for (int r = 0; r < BLOCK; r++) {
            even[r] += from_bf16(read_u16(p + 4 * r)) * from_bf16(x[2 * j]);
            odd[r] += from_bf16(read_u16(p + 4 * r + 2)) * from_bf16(x[2 * j + 1]);
        }
    for (int r = 0; r < BLOCK; r++)
        out[r] = even[r] + odd[r];
}

enum { AT_ONCE = 1, TOGETHER = 1 };
#include "forms.h"

#define INT4_OF(n, together, own) int4(w, own, x, xg, out, 0)
#define WIDE_OF(n, together, own) int4(w, own, x, xg, out, 1)
#define INT8_OF(n, together, own) int8(w, own, x, xg, out)
#define BF16_OF(n, together, own) bf16(w, own, x, out)
FORMS(int4_tile, , int8_t, AT_ONCE, INT4_OF)
FORMS(wide_tile, , int8_t, AT_ONCE, WIDE_OF)
FORMS(int8_tile, , int8_t, AT_ONCE, INT8_OF)
FORMS(bf16_tile, , uint16_t, AT_ONCE, BF16_OF)

const struct kernels fedtune_portable = {to_int8, to_bf16, copy_row, {int4_tile, wide_tile, int8_tile, bf16_tile, plain_tile}, &operations};
