/* The kernels with AVX-512 and its integer dot product (VNNI), and with its bfloat16 dot product: all 16 rows of a block at a time. */
#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>

#define VNNI_CODE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define INLINE static inline __attribute__((always_inline)) VNNI_CODE

INLINE __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

INLINE __m512 larger_of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }

INLINE __m512 smaller_of(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }

INLINE float sum_of_lanes(__m512 v) { return _mm512_reduce_add_ps(v); }

INLINE __m512i ints_of_bytes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
}

INLINE __m512i ints_of_halves(const uint16_t *p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
}

INLINE float most_of_lanes(__m512 v) { return _mm512_reduce_max_ps(v); }

INLINE __m512 sums_of_lanes(const __m512 *v) {
    __m512 quarter[4];
    for (int i = 0; i < 4; i++) { /* the sums of 4 vectors, in each 128 bits */
        __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * i], v[4 * i + 1]), _mm512_unpackhi_ps(v[4 * i], v[4 * i + 1]));
        __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * i + 2], v[4 * i + 3]), _mm512_unpackhi_ps(v[4 * i + 2], v[4 * i + 3]));
        quarter[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x88), _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xdd));
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[2], quarter[3], 0x88), _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

#define CODE VNNI_CODE
#define LANES 16
#include "rows.h"
#include "plain.h"

#define BF16_CODE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))
#define AHEAD 2048 /* bytes to prefetch ahead: the processor's own prefetcher stops at the end of a page */

INLINE __m512i four_of(const void *x) { /* 4 bytes of x, repeated for each row of a block */
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

INLINE void fetch(const uint8_t *p, int lines) {
    for (int i = 0; i < lines; i++)
        _mm_prefetch((const char *)((uintptr_t)p + AHEAD + 64 * (uintptr_t)i), _MM_HINT_T0);
}

INLINE __m512 from_bf16(const uint8_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}

enum { AT_ONCE = 4, TOGETHER = 2 }; /* rows of x, and blocks, of a call: 8 sums hide a product's latency and leave registers for the rest */

/* Prefetches the next blocks, which have `lines` cache lines for each group. The `tiles` tiles of AT_ONCE rows share this work: tile number `at`
 * fetches lines at, at + tiles, ... for its group g. */
INLINE void fetch_share(const uint8_t *next, int64_t groups, int64_t g, int at, int tiles, const int lines) {
    for (int i = at; i < lines && next; i += tiles)
        _mm_prefetch((const char *)((uintptr_t)next + 64 * (uintptr_t)(i * groups + g)), _MM_HINT_T0);
}

/* Prefetches group g of the next AT_ONCE rows, which are too short for the processor's own prefetcher. Odd groups fetch the columns instead: a
 * cache line holds the codes of two groups and the columns of four. */
INLINE void fetch_rows(const int8_t *x, int64_t groups, const struct columns *xg, int64_t g) {
    for (int r = AT_ONCE; r < 2 * AT_ONCE; r++)
        _mm_prefetch((const char *)((g % 2 ? (uintptr_t)xg : (uintptr_t)x) + (g % 2 ? sizeof *xg : GROUP) * (uintptr_t)(r * groups + g)), _MM_HINT_T0);
}

INLINE void int4(const struct fedtune_weights *w, int64_t block, const int8_t *x, const struct columns *xg, const int rows, const int blocks,
                 int64_t next, int at, int wholes, float *out, int64_t stride, const int wide) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP, scale_bytes = wide ? 64 : 32;
    const uint8_t *p = w->codes + block * groups * 256, *s = w->scales + block * groups * scale_bytes;
    const uint8_t *codes_next = next ? w->codes + next * groups * 256 : NULL, *scales_next = next ? w->scales + next * groups * scale_bytes : NULL;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 product[AT_ONCE][TOGETHER], shift[AT_ONCE][TOGETHER];
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++)
            product[r][b] = shift[r][b] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, p += 256, s += scale_bytes) {
        __m512i dot[AT_ONCE][TOGETHER];
        if (blocks > 1)
            fetch_rows(x, groups, xg, g), fetch_share(codes_next, groups, g, at, wholes, 8),
                fetch_share(scales_next, groups, g, at, wholes, wide ? 2 : 1);
        else
            fetch(p, 4);
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < blocks; b++)
                dot[r][b] = four_of(&xg[r * groups + g].minus_8);
        for (int j = 0; j < 4; j++) {
            __m512i first[TOGETHER], second[TOGETHER];
            for (int b = 0; b < blocks; b++) {
                __m512i both = _mm512_loadu_si512(p + b * groups * 256 + 64 * j);
                first[b] = _mm512_and_si512(both, low);
                second[b] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            }
            for (int r = 0; r < rows; r++) {
                const int8_t *c = x + r * width + g * GROUP + 4 * j;
                __m512i one = four_of(c), two = four_of(c + 16);
                for (int b = 0; b < blocks; b++)
                    dot[r][b] = _mm512_dpbusd_epi32(dot[r][b], first[b], one);
                for (int b = 0; b < blocks; b++)
                    dot[r][b] = _mm512_dpbusd_epi32(dot[r][b], second[b], two);
            }
        }
        for (int b = 0; b < blocks; b++) {
            const uint8_t *own = s + b * groups * scale_bytes;
            __m512 scale = wide ? from_bf16(own) : _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)own)));
            __m512 zero = wide ? from_bf16(own + 32) : _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(own + 16))));
            for (int r = 0; r < rows; r++) {
                const struct columns *c = xg + r * groups + g;
                product[r][b] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(c->scale)), _mm512_cvtepi32_ps(dot[r][b]), product[r][b]);
                shift[r][b] = _mm512_fmadd_ps(zero, _mm512_set1_ps(c->sum), shift[r][b]);
            }
        }
    }
    for (int b = 0; b < blocks; b++) {
        const __m512 scales = _mm512_set1_ps(w->base[2 * (block + b)]), zeros = _mm512_set1_ps(w->base[2 * (block + b) + 1]);
        for (int r = 0; r < rows; r++)
            _mm512_storeu_ps(out + r * stride + b * BLOCK, wide ? _mm512_add_ps(product[r][b], shift[r][b])
                                                                : _mm512_fmadd_ps(shift[r][b], zeros, _mm512_mul_ps(product[r][b], scales)));
    }
}

INLINE void int8(const struct fedtune_weights *w, int64_t block, const int8_t *x, const struct columns *xg, const int rows, const int blocks,
                 int64_t next, int at, int wholes, float *out, int64_t stride) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const uint8_t *p = w->codes + block * groups * 512, *codes_next = next ? w->codes + next * groups * 512 : NULL;
    __m512 product[AT_ONCE][TOGETHER];
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++)
            product[r][b] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, p += 512) {
        __m512i dot[AT_ONCE][TOGETHER];
        if (blocks > 1)
            fetch_rows(x, groups, xg, g), fetch_share(codes_next, groups, g, at, wholes, 16);
        else
            fetch(p, 8);
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < blocks; b++)
                dot[r][b] = four_of(&xg[r * groups + g].minus_128);
        for (int j = 0; j < 8; j++) {
            __m512i code[TOGETHER];
            for (int b = 0; b < blocks; b++)
                code[b] = _mm512_loadu_si512(p + b * groups * 512 + 64 * j);
            for (int r = 0; r < rows; r++) {
                __m512i four = four_of(x + r * width + g * GROUP + 4 * j);
                for (int b = 0; b < blocks; b++)
                    dot[r][b] = _mm512_dpbusd_epi32(dot[r][b], code[b], four);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < blocks; b++)
                product[r][b] = _mm512_fmadd_ps(_mm512_set1_ps(xg[r * groups + g].scale), _mm512_cvtepi32_ps(dot[r][b]), product[r][b]);
    }
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++)
            _mm512_storeu_ps(out + r * stride + b * BLOCK, _mm512_mul_ps(product[r][b], _mm512_loadu_ps(w->base + BLOCK * (block + b))));
}

static inline __attribute__((always_inline)) BF16_CODE void bf16(const struct fedtune_weights *w, int64_t block, const uint16_t *x, const int rows,
                                                                 const int blocks, int at, float *out, int64_t stride) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const uint8_t *p = w->codes + block * groups * 1024;
    __m512 sums[2][AT_ONCE][TOGETHER];
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++)
            sums[0][r][b] = sums[1][r][b] = _mm512_setzero_ps();
    for (int64_t j = 0; j < width / 2; j += 2, p += 128) {
        for (int b = 0; b < blocks && !at; b++)
            fetch(p + b * groups * 1024, 2);
        for (int k = 0; k < 2; k++) {
            __m512bh two[TOGETHER];
            for (int b = 0; b < blocks; b++)
                two[b] = (__m512bh)_mm512_loadu_si512(p + b * groups * 1024 + 64 * k);
            for (int r = 0; r < rows; r++) {
                __m512bh own = (__m512bh)four_of(x + r * width + 2 * (j + k));
                for (int b = 0; b < blocks; b++)
                    sums[k][r][b] = _mm512_dpbf16_ps(sums[k][r][b], two[b], own);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++)
            _mm512_storeu_ps(out + r * stride + b * BLOCK, _mm512_add_ps(sums[0][r][b], sums[1][r][b]));
}

#include "forms.h"

#define INT4_OF(n, together, own) int4(w, own, x, xg, n, together, next, at, wholes, out, stride, 0)
#define WIDE_OF(n, together, own) int4(w, own, x, xg, n, together, next, at, wholes, out, stride, 1)
#define INT8_OF(n, together, own) int8(w, own, x, xg, n, together, next, at, wholes, out, stride)
#define BF16_OF(n, together, own) bf16(w, own, x, n, together, at, out, stride)
FORMS(int4_tile, VNNI_CODE, int8_t, AT_ONCE, INT4_OF)
FORMS(wide_tile, VNNI_CODE, int8_t, AT_ONCE, WIDE_OF)
FORMS(int8_tile, VNNI_CODE, int8_t, 2 * AT_ONCE, INT8_OF)
FORMS(bf16_tile, BF16_CODE, uint16_t, 2 * AT_ONCE, BF16_OF)

INLINE __mmask16 mask_of(int64_t n) { return n >= 16 ? 0xffff : n > 0 ? (__mmask16)((1 << n) - 1) : 0; } /* the first n of 16 lanes */

/* Rounds 16 groups at a time, so that their scales are computed as vectors. */
VNNI_CODE static void to_int8(const float *x, int64_t n_in, void *codes, struct columns *groups) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    int8_t *out = codes;
    for (int64_t at = 0; at < n_in; at += 16 * GROUP, out += 16 * GROUP, groups += 16) {
        const int count = (int)smaller(16, groups_of(n_in - at));
        int32_t most[16] = {0}, totals[16] = {0};
        float inverse[16];
        for (int g = 0; g < count; g++) {
            const int64_t from = at + g * GROUP;
            const __mmask16 one = mask_of(n_in - from), two = mask_of(n_in - from - 16);
            __m512i a = _mm512_maskz_loadu_epi32(one, x + from), b = _mm512_maskz_loadu_epi32(two, x + from + 16);
            most[g] = _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_and_si512(a, magnitude), _mm512_and_si512(b, magnitude)));
        }
        const __m512i bits = _mm512_loadu_si512(most); /* as integers, in whose order NaN and infinity are the largest */
        const __m512 greatest = _mm512_castsi512_ps(bits), steps = _mm512_set1_ps(127.0f);
        const __mmask16 finite = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
        const __mmask16 good = _mm512_mask_cmp_ps_mask(finite, greatest, _mm512_set1_ps(TINY), _CMP_GE_OQ);
        _mm512_storeu_ps(inverse, _mm512_maskz_div_ps(good, steps, greatest));
        for (int g = 0; g < count; g++) {
            const int64_t from = at + g * GROUP;
            const int64_t n = inverse[g] != 0 ? n_in - from : 0; /* all zeros if a number is not finite or all are smaller than TINY */
            const __mmask16 one = mask_of(n), two = mask_of(n - 16);
            const __m512 factor = _mm512_set1_ps(inverse[g]);
            __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(one, x + from), factor));
            __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(two, x + from + 16), factor));
            _mm_storeu_si128((void *)(out + g * GROUP), _mm512_cvtepi32_epi8(a));
            _mm_storeu_si128((void *)(out + g * GROUP + 16), _mm512_cvtepi32_epi8(b));
            totals[g] = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
        }
        const __m512i total = _mm512_maskz_loadu_epi32(good, totals);
        const __m512 scale = _mm512_mask_blend_ps(finite, _mm512_set1_ps(__builtin_nanf("")), _mm512_maskz_div_ps(good, greatest, steps));
        const __m512 sum = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(total));
        struct { /* 16 times struct columns, member by member */
            float scale[16], sum[16];
            int32_t minus_8[16], minus_128[16];
        } all;
        _mm512_storeu_ps(all.scale, scale), _mm512_storeu_ps(all.sum, sum);
        _mm512_storeu_si512(all.minus_8, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(total, 3)));
        _mm512_storeu_si512(all.minus_128, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(total, 7)));
        for (int g = 0; g < count; g++)
            groups[g] = (struct columns){all.scale[g], all.sum[g], all.minus_8[g], all.minus_128[g]};
    }
}

VNNI_CODE static void slow_bf16(const struct fedtune_weights *w, int64_t block, int blocks, int64_t next, const void *x,
                                const struct columns *xg, int rows, float *out, int64_t stride) {
    fedtune_avx2.tiles[BF16](w, block, blocks, next, x, xg, rows, out, stride);
}

const struct kernels fedtune_avx512 = {to_int8, to_bf16, copy_row, {int4_tile, wide_tile, int8_tile, slow_bf16, plain_tile}, &operations};
const struct kernels fedtune_avx512_bf16 = {to_int8, to_bf16, copy_row, {int4_tile, wide_tile, int8_tile, bf16_tile, plain_tile}, &operations};
#endif
