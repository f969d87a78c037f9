/* The kernels with AVX-512 and its integer dot product (VNNI), and with its bfloat16 dot product: all 16 rows of a block at a time. */
#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>

#define VNNI_CODE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

static inline __attribute__((always_inline)) VNNI_CODE __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

static inline __attribute__((always_inline)) VNNI_CODE float sum_of_lanes(__m512 v) { return _mm512_reduce_add_ps(v); }

static inline __attribute__((always_inline)) VNNI_CODE __m512i ints_of_bytes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
}

static inline __attribute__((always_inline)) VNNI_CODE __m512i ints_of_halves(const uint16_t *p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
}

static inline __attribute__((always_inline)) VNNI_CODE float most_of_lanes(__m512 v) { return _mm512_reduce_max_ps(v); }

static inline __attribute__((always_inline)) VNNI_CODE __m512 sums_of_lanes(const __m512 *v) {
    __m512 quarter[4];
    for (int i = 0; i < 4; i++) { /* of 4 vectors, in each quarter */
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

static inline __attribute__((always_inline)) VNNI_CODE __m512i four_of(const void *x) { /* 4 bytes of x for every row */
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

static inline __attribute__((always_inline)) VNNI_CODE void fetch(const uint8_t *p, int lines) {
    for (int i = 0; i < lines; i++)
        _mm_prefetch((const char *)((uintptr_t)p + AHEAD + 64 * (uintptr_t)i), _MM_HINT_T0);
}

static inline __attribute__((always_inline)) VNNI_CODE __m512 from_bf16(const uint8_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}

static inline __attribute__((always_inline)) VNNI_CODE void int4(const struct fedtune_weights *w, int64_t block, const int8_t *x,
                                                                 const struct columns *xg, const int rows, float *out, const int wide) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const uint8_t *p = w->codes + block * groups * 256, *s = w->scales + block * groups * (wide ? 64 : 32);
    const __m512i low = _mm512_set1_epi8(15);
    __m512 product[TILE], shift[TILE];
    for (int r = 0; r < rows; r++)
        product[r] = shift[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, p += 256, s += wide ? 64 : 32) {
        __m512i a[4], b[4];
        fetch(p, 4);
        for (int j = 0; j < 4; j++) {
            __m512i both = _mm512_loadu_si512(p + 64 * j);
            a[j] = _mm512_and_si512(both, low);
            b[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
        __m512 scale = wide ? from_bf16(s) : _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)s)));
        __m512 zero = wide ? from_bf16(s + 32) : _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(s + 16))));
        for (int r = 0; r < rows; r++) {
            const int8_t *c = x + r * width + g * GROUP;
            const struct columns *own = xg + r * groups + g;
            __m512i one = four_of(&own->minus_8), two = _mm512_setzero_si512();
            for (int j = 0; j < 4; j++) {
                one = _mm512_dpbusd_epi32(one, a[j], four_of(c + 4 * j));
                two = _mm512_dpbusd_epi32(two, b[j], four_of(c + 16 + 4 * j));
            }
            __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(one, two));
            product[r] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(own->scale)), dot, product[r]);
            shift[r] = _mm512_fmadd_ps(zero, _mm512_set1_ps(own->sum), shift[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        __m512 y = wide ? _mm512_add_ps(product[r], shift[r])
                        : _mm512_fmadd_ps(shift[r], _mm512_set1_ps(w->base[2 * block + 1]), _mm512_mul_ps(product[r], _mm512_set1_ps(w->base[2 * block])));
        _mm512_storeu_ps(out + r * BLOCK, y);
    }
}

static inline __attribute__((always_inline)) VNNI_CODE void int8(const struct fedtune_weights *w, int64_t block, const int8_t *x,
                                                                 const struct columns *xg, const int rows, float *out) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const uint8_t *p = w->codes + block * groups * 512;
    __m512 product[TILE];
    for (int r = 0; r < rows; r++)
        product[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, p += 512) {
        __m512i code[8];
        fetch(p, 8);
        for (int j = 0; j < 8; j++)
            code[j] = _mm512_loadu_si512(p + 64 * j);
        for (int r = 0; r < rows; r++) {
            const int8_t *c = x + r * width + g * GROUP;
            const struct columns *own = xg + r * groups + g;
            __m512i one = four_of(&own->minus_128), two = _mm512_setzero_si512();
            for (int j = 0; j < 8; j += 2) {
                one = _mm512_dpbusd_epi32(one, code[j], four_of(c + 4 * j));
                two = _mm512_dpbusd_epi32(two, code[j + 1], four_of(c + 4 * j + 4));
            }
            __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(one, two));
            product[r] = _mm512_fmadd_ps(_mm512_set1_ps(own->scale), dot, product[r]);
        }
    }
    for (int r = 0; r < rows; r++)
        _mm512_storeu_ps(out + r * BLOCK, _mm512_mul_ps(product[r], _mm512_loadu_ps(w->base + BLOCK * block)));
}

static inline __attribute__((always_inline)) BF16_CODE void bf16(const struct fedtune_weights *w, int64_t block, const uint16_t *x,
                                                                 const int rows, float *out) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const uint8_t *p = w->codes + block * groups * 1024;
    __m512 one[TILE], two[TILE];
    for (int r = 0; r < rows; r++)
        one[r] = two[r] = _mm512_setzero_ps();
    for (int64_t j = 0; j < width / 2; j += 2, p += 128) {
        __m512bh first = (__m512bh)_mm512_loadu_si512(p), second = (__m512bh)_mm512_loadu_si512(p + 64);
        fetch(p, 2);
        for (int r = 0; r < rows; r++) {
            one[r] = _mm512_dpbf16_ps(one[r], first, (__m512bh)four_of(x + r * width + 2 * j));
            two[r] = _mm512_dpbf16_ps(two[r], second, (__m512bh)four_of(x + r * width + 2 * j + 2));
        }
    }
    for (int r = 0; r < rows; r++)
        _mm512_storeu_ps(out + r * BLOCK, _mm512_add_ps(one[r], two[r]));
}

/* Defines NAME, which calls a product with its number of rows as a constant, so that the sums stay in registers. */
#define FORMS(NAME, TARGET, ...)                                                                                                           \
    TARGET static void NAME(const struct fedtune_weights *w, int64_t block, const void *x, const struct columns *xg, int rows, float *out) { \
        (void)xg;                                                                                                                          \
        switch (rows) {                                                                                                                    \
        case 1: __VA_ARGS__(1); break;                                                                                                     \
        case 2: __VA_ARGS__(2); break;                                                                                                     \
        case 3: __VA_ARGS__(3); break;                                                                                                     \
        case 4: __VA_ARGS__(4); break;                                                                                                     \
        case 5: __VA_ARGS__(5); break;                                                                                                     \
        case 6: __VA_ARGS__(6); break;                                                                                                     \
        case 7: __VA_ARGS__(7); break;                                                                                                     \
        default: __VA_ARGS__(8);                                                                                                           \
        }                                                                                                                                  \
    }
#define INT4_OF(n) int4(w, block, x, xg, n, out, 0)
#define WIDE_OF(n) int4(w, block, x, xg, n, out, 1)
#define INT8_OF(n) int8(w, block, x, xg, n, out)
#define BF16_OF(n) bf16(w, block, x, n, out)
FORMS(int4_tile, VNNI_CODE, INT4_OF)
FORMS(wide_tile, VNNI_CODE, WIDE_OF)
FORMS(int8_tile, VNNI_CODE, INT8_OF)
FORMS(bf16_tile, BF16_CODE, BF16_OF)

VNNI_CODE static void to_int8(const float *x, int64_t n_in, void *codes, struct columns *groups) {
    fedtune_avx2.to_int8(x, n_in, codes, groups);
}

VNNI_CODE static void to_bf16(const float *x, int64_t n_in, void *codes, struct columns *groups) {
    fedtune_portable.to_bf16(x, n_in, codes, groups);
}

VNNI_CODE static void slow_bf16(const struct fedtune_weights *w, int64_t block, const void *x, const struct columns *xg, int rows, float *out) {
    fedtune_avx2.tiles[BF16](w, block, x, xg, rows, out);
}

const struct kernels fedtune_avx512 = {to_int8, to_bf16, copy_row, {int4_tile, wide_tile, int8_tile, slow_bf16, plain_tile}, &operations};
const struct kernels fedtune_avx512_bf16 = {to_int8, to_bf16, copy_row, {int4_tile, wide_tile, int8_tile, bf16_tile, plain_tile}, &operations};
#endif
