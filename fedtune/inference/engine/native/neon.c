/* The kernels for aarch64 with the dot product of 8-bit integers (dotprod), and with their matrix product (i8mm). Integer sums are exact, and floats
 * are added in the order of avx2.c, so that int4, int8 and bf16 give its bits. Every function has its own target. */
#include "kernels.h"
#ifdef HAS_NEON
#include <arm_neon.h>

#define DOT_CODE __attribute__((target("arch=armv8.2-a+dotprod")))
#define INLINE static inline __attribute__((always_inline)) DOT_CODE

INLINE float32x4_t fused(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }

INLINE float32x4_t larger_of(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }

INLINE float32x4_t smaller_of(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }

INLINE float sum_of_lanes(float32x4_t v) { return vpadds_f32(vadd_f32(vget_low_f32(v), vget_high_f32(v))); }

INLINE int32x4_t ints_of_bytes(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}

INLINE int32x4_t ints_of_halves(const uint16_t *p) {
    return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t *)p))));
}

INLINE float most_of_lanes(float32x4_t v) { return vmaxvq_f32(v); }

typedef float four __attribute__((vector_size(16)));

INLINE float32x4_t sums_of_lanes(const four *v) { return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])); }

#define CODE DOT_CODE
#define LANES 4
#include "rows.h"
#include "plain.h"

enum { AT_ONCE = 4, TOGETHER = 1 }; /* rows of x, and blocks, of a call: more do not fit in the 32 registers */

DOT_CODE static void to_int8(const float *x, int64_t n_in, void *codes, struct columns *groups) {
    int8_t *out = codes;
    for (int64_t at = 0; at < n_in; at += GROUP, out += GROUP, groups++) {
        float last[GROUP] = {0};
        const float *from = x + at;
        if (n_in - at < GROUP) {
            memcpy(last, from, (size_t)(n_in - at) * sizeof *x);
            from = last;
        }
        float32x4_t v[8];
        uint32x4_t most = vdupq_n_u32(0);
        for (int i = 0; i < 8; i++) {
            v[i] = vld1q_f32(from + 4 * i);
            most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(v[i])));
        }
        uint32_t bits = vmaxvq_u32(most); /* as an integer, in whose order NaN and infinity are the largest */
        float greatest;
        memcpy(&greatest, &bits, sizeof greatest);
        memset(groups, 0, sizeof *groups);
        if (bits >= 0x7f800000) {
            groups->scale = groups->sum = __builtin_nanf("");
            memset(out, 0, GROUP);
        } else if (!(greatest >= TINY)) {
            memset(out, 0, GROUP);
        } else {
            const float inverse = 127.0f / greatest;
            int32_t total = 0;
            for (int i = 0; i < 8; i += 4) {
                int32x4_t c[4];
                for (int k = 0; k < 4; k++) {
                    c[k] = vcvtnq_s32_f32(vmulq_n_f32(v[i + k], inverse));
                    total += vaddvq_s32(c[k]);
                }
                int16x8_t one = vcombine_s16(vmovn_s32(c[0]), vmovn_s32(c[1])), two = vcombine_s16(vmovn_s32(c[2]), vmovn_s32(c[3]));
                vst1q_s8(out + 4 * i, vcombine_s8(vmovn_s16(one), vmovn_s16(two)));
            }
            groups->scale = greatest / 127.0f;
            groups->sum = groups->scale * (float)total;
            groups->minus_8 = -8 * total, groups->minus_128 = -128 * total;
        }
    }
}

/* The products below read 16 bytes of codes at a time, which belong to 4 outputs. */

INLINE float32x4_t from_bf16(const uint8_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16)); }

/* Scales and zeros of 2 * pairs vectors of 4 outputs each, from vector `first` of the block. */
INLINE void int4_scales(const uint8_t *s, int first, const int pairs, const int wide, float32x4_t *scale, float32x4_t *zero) {
    for (int i = 0; i < pairs; i++, scale += 2, zero += 2) {
        const uint8_t *own = s + (wide ? 2 : 1) * (4 * first + 8 * i);
        if (wide) {
            scale[0] = from_bf16(own), scale[1] = from_bf16(own + 8);
            zero[0] = from_bf16(own + 32), zero[1] = from_bf16(own + 40);
        } else {
            uint16x8_t scales = vmovl_u8(vld1_u8(own));
            int16x8_t zeros = vmovl_s8(vreinterpret_s8_u8(vld1_u8(own + 16)));
            scale[0] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(scales))), scale[1] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(scales)));
            zero[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(zeros))), zero[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(zeros)));
        }
    }
}

INLINE int8x16_t low_half(uint8x16_t both) { return vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))); }

INLINE int8x16_t high_half(uint8x16_t both) { return vreinterpretq_s8_u8(vshrq_n_u8(both, 4)); }

INLINE int8x16_t less_128(uint8x16_t codes) { return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128))); }

/* Adds the products of one group to dots[r][v], the sums of row r of x and of outputs 4 v .. 4 v + 3, counted from the first in p. A macro
 * unrolls the columns because a lane's number must be a literal. */
INLINE void int4_dots_by_dot(const uint8_t *p, const int8_t *x, int64_t width, const int rows, const int vectors, int32x4_t dots[AT_ONCE][4]) {
#define COLUMNS_OF(j)                                                                                                                      \
    for (int v = 0; v < vectors; v++) {                                                                                                    \
        uint8x16_t both = vld1q_u8(p + 64 * j + 16 * v);                                                                                   \
        int8x16_t a = low_half(both), b = high_half(both);                                                                                 \
        for (int r = 0; r < rows; r++)                                                                                                     \
            dots[r][v] = vdotq_laneq_s32(vdotq_laneq_s32(dots[r][v], a, vld1q_s8(x + r * width), j), b, vld1q_s8(x + r * width + 16), j); \
    }
    COLUMNS_OF(0) COLUMNS_OF(1) COLUMNS_OF(2) COLUMNS_OF(3)
#undef COLUMNS_OF
}

INLINE void int8_dots_by_dot(const uint8_t *p, const int8_t *x, int64_t width, const int rows, const int vectors, int32x4_t dots[AT_ONCE][4]) {
#define COLUMNS_OF(j)                                                                                                                      \
    for (int v = 0; v < vectors; v++) {                                                                                                    \
        int8x16_t a = less_128(vld1q_u8(p + 64 * j + 16 * v));                                                                             \
        for (int r = 0; r < rows; r++)                                                                                                     \
            dots[r][v] = vdotq_laneq_s32(dots[r][v], a, vld1q_s8(x + r * width), j);                                                       \
    }
    for (int half = 0; half < 2; half++, p += 256, x += 16) {
        COLUMNS_OF(0) COLUMNS_OF(1) COLUMNS_OF(2) COLUMNS_OF(3)
    }
#undef COLUMNS_OF
}

INLINE void bf16(const struct fedtune_weights *w, int64_t block, const uint16_t *x, const int rows, float *out, int64_t stride) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const int vectors = rows > 2 ? 2 : 4;
    const uint32x4_t high = vdupq_n_u32(0xffff0000);
    for (int first = 0; first < 4; first += vectors) {
        const uint8_t *p = w->codes + block * groups * 1024 + 16 * first;
        float32x4_t even[AT_ONCE][4], odd[AT_ONCE][4];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                even[r][v] = odd[r][v] = vdupq_n_f32(0);
        for (int64_t j = 0; j < width; j += 8, p += 256) {
            float32x4_t a[AT_ONCE], b[AT_ONCE]; /* even and odd columns of x */
            for (int r = 0; r < rows; r++) {
                uint32x4_t both = vreinterpretq_u32_u8(vld1q_u8((const uint8_t *)(x + r * width + j)));
                a[r] = vreinterpretq_f32_u32(vshlq_n_u32(both, 16)), b[r] = vreinterpretq_f32_u32(vandq_u32(both, high));
            }
#define COLUMNS_OF(k)                                                                                                                      \
    for (int v = 0; v < vectors; v++) {                                                                                                    \
        uint32x4_t two = vreinterpretq_u32_u8(vld1q_u8(p + 64 * k + 16 * v));                                                              \
        float32x4_t one = vreinterpretq_f32_u32(vshlq_n_u32(two, 16)), other = vreinterpretq_f32_u32(vandq_u32(two, high));                \
        for (int r = 0; r < rows; r++) {                                                                                                   \
            even[r][v] = vfmaq_laneq_f32(even[r][v], one, a[r], k);                                                                        \
            odd[r][v] = vfmaq_laneq_f32(odd[r][v], other, b[r], k);                                                                        \
        }                                                                                                                                  \
    }
            COLUMNS_OF(0) COLUMNS_OF(1) COLUMNS_OF(2) COLUMNS_OF(3)
#undef COLUMNS_OF
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                vst1q_f32(out + r * stride + 4 * (first + v), vaddq_f32(even[r][v], odd[r][v]));
    }
}

#include "forms.h"

#define BF16_OF(n, together, own) bf16(w, own, x, n, out, stride)
FORMS(bf16_tile, DOT_CODE, uint16_t, AT_ONCE, BF16_OF)

#define NAMED(name) name##_by_dot
#define PRODUCT INLINE
#define PRODUCT_CODE DOT_CODE
#include "neon.h"
const struct kernels fedtune_dotprod = {to_int8, to_bf16, copy_row, {int4_tile_by_dot, wide_tile_by_dot, int8_tile_by_dot, bf16_tile, plain_tile}, &operations};

#undef NAMED
#undef PRODUCT
#undef PRODUCT_CODE
#define I8MM_CODE __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#define I8MM_INLINE static inline __attribute__((always_inline)) I8MM_CODE

/* 8 columns of rows 2 i and 2 i + 1 of x. If the number of rows is odd, the last one is taken twice. */
I8MM_INLINE int8x16_t two_rows(const int8_t *x, int64_t width, int i, int rows) {
    return vcombine_s8(vld1_s8(x + 2 * i * width), vld1_s8(x + smaller(2 * i + 1, rows - 1) * width));
}

/* 8 columns of outputs 2 i and 2 i + 1 of four: p has the first 4 columns of all four outputs, `next` the next 4. */
I8MM_INLINE uint8x16_t two_outputs(uint8x16_t p, uint8x16_t next, const int i) {
    uint32x4_t a = vreinterpretq_u32_u8(p), b = vreinterpretq_u32_u8(next);
    return vreinterpretq_u8_u32(i ? vzip2q_u32(a, b) : vzip1q_u32(a, b));
}

/* Adds sums[i][2 v + k], the 2 x 2 sums of rows 2 i, 2 i + 1 of x and outputs 4 v + 2 k, 4 v + 2 k + 1, to dots[r][v]. */
I8MM_INLINE void add_sums(int32x4_t sums[AT_ONCE / 2][8], const int rows, const int vectors, int32x4_t dots[AT_ONCE][4]) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            int32x4_t a = sums[r / 2][2 * v], b = sums[r / 2][2 * v + 1];
            dots[r][v] = vaddq_s32(dots[r][v], r % 2 ? vuzp2q_s32(a, b) : vuzp1q_s32(a, b));
        }
}

I8MM_INLINE void int4_dots_by_i8mm(const uint8_t *p, const int8_t *x, int64_t width, const int rows, const int vectors, int32x4_t dots[AT_ONCE][4]) {
    if (rows == 1) {
        int4_dots_by_dot(p, x, width, rows, vectors, dots);
        return;
    }
    int32x4_t sums[AT_ONCE / 2][8] = {{vdupq_n_s32(0)}};
    for (int k = 0; k < 2; k++)
        for (int v = 0; v < 2 * vectors; v++) {
            const uint8_t *own = p + 128 * k + 16 * (v / 2);
            uint8x16_t both = two_outputs(vld1q_u8(own), vld1q_u8(own + 64), v % 2);
            int8x16_t a = low_half(both), b = high_half(both);
            for (int i = 0; i < (rows + 1) / 2; i++)
                sums[i][v] = vmmlaq_s32(vmmlaq_s32(sums[i][v], a, two_rows(x + 8 * k, width, i, rows)), b, two_rows(x + 16 + 8 * k, width, i, rows));
        }
    add_sums(sums, rows, vectors, dots);
}

I8MM_INLINE void int8_dots_by_i8mm(const uint8_t *p, const int8_t *x, int64_t width, const int rows, const int vectors, int32x4_t dots[AT_ONCE][4]) {
    if (rows == 1) {
        int8_dots_by_dot(p, x, width, rows, vectors, dots);
        return;
    }
    int32x4_t sums[AT_ONCE / 2][8] = {{vdupq_n_s32(0)}};
    for (int k = 0; k < 4; k++)
        for (int v = 0; v < 2 * vectors; v++) {
            const uint8_t *own = p + 128 * k + 16 * (v / 2);
            int8x16_t a = less_128(two_outputs(vld1q_u8(own), vld1q_u8(own + 64), v % 2));
            for (int i = 0; i < (rows + 1) / 2; i++)
                sums[i][v] = vmmlaq_s32(sums[i][v], a, two_rows(x + 8 * k, width, i, rows));
        }
    add_sums(sums, rows, vectors, dots);
}

#define NAMED(name) name##_by_i8mm
#define PRODUCT I8MM_INLINE
#define PRODUCT_CODE I8MM_CODE
#include "neon.h"
const struct kernels fedtune_i8mm = {to_int8, to_bf16, copy_row, {int4_tile_by_i8mm, wide_tile_by_i8mm, int8_tile_by_i8mm, bf16_tile, plain_tile}, &operations};
#endif
