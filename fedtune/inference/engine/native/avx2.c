/* The kernels with AVX2 and FMA: 8 rows of a block at a time. Every function names its target, so that the
 * compiler uses these instructions in no other file. */
#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2_CODE __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX2_CODE

INLINE __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

INLINE __m256 larger_of(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }

INLINE __m256 smaller_of(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }

INLINE float sum_of_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE __m256i ints_of_bytes(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }

INLINE __m256i ints_of_halves(const uint16_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)); }

INLINE float most_of_lanes(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

INLINE __m256 sums_of_lanes(const __m256 *v) {
    __m256 half[2];
    for (int i = 0; i < 2; i++) { /* the sums of 4 vectors, in each 128 bits */
        __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(v[4 * i], v[4 * i + 1]), _mm256_unpackhi_ps(v[4 * i], v[4 * i + 1]));
        __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(v[4 * i + 2], v[4 * i + 3]), _mm256_unpackhi_ps(v[4 * i + 2], v[4 * i + 3]));
        half[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(half[0], half[1], 0x20), _mm256_permute2f128_ps(half[0], half[1], 0x31));
}

#define CODE AVX2_CODE
#define LANES 8
#include "rows.h"
#include "plain.h"

enum { AT_ONCE = 4, TOGETHER = 1 }; /* rows of x, and blocks, of a call: more do not fit in the 16 registers */

INLINE int32_t sum_of(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

INLINE int32_t most_of(__m256i v) {
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

AVX2_CODE static void to_int8(const float *x, int64_t n_in, void *codes, struct columns *groups) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    int8_t *out = codes;
    for (int64_t at = 0; at < n_in; at += GROUP, out += GROUP, groups++) {
        float last[GROUP] = {0};
        const float *from = x + at;
        if (n_in - at < GROUP) {
            memcpy(last, from, (size_t)(n_in - at) * sizeof *x);
            from = last;
        }
        __m256 v[4];
        __m256i most = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(from + 8 * i);
            most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
        }
        int32_t bits = most_of(most); /* as an integer, in whose order NaN and infinity are the largest */
        float greatest;
        memcpy(&greatest, &bits, sizeof greatest);
        memset(groups, 0, sizeof *groups);
        if (bits >= 0x7f800000) {
            groups->scale = groups->sum = __builtin_nanf("");
            memset(out, 0, GROUP);
        } else if (!(greatest >= TINY)) {
            memset(out, 0, GROUP);
        } else {
            __m256 inverse = _mm256_set1_ps(127.0f / greatest);
            __m256i c[4];
            for (int i = 0; i < 4; i++)
                c[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
            int32_t total = sum_of(_mm256_add_epi32(_mm256_add_epi32(c[0], c[1]), _mm256_add_epi32(c[2], c[3])));
            groups->scale = greatest / 127.0f;
            groups->sum = groups->scale * (float)total;
            groups->minus_8 = -8 * total, groups->minus_128 = -128 * total;
            __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
            packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); /* packs work within 128 bits */
            _mm256_storeu_si256((void *)out, packed);
        }
    }
}

INLINE __m256i four_of(const void *x) { /* 4 bytes of x, repeated for each row of a block */
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

INLINE __m256 from_bf16(const uint8_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}

INLINE __m256 int4_scale(const uint8_t *s, int half, const int wide) {
    return wide ? from_bf16(s + 16 * half) : _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(s + 8 * half))));
}

INLINE __m256 int4_zero(const uint8_t *s, int half, const int wide) {
    return wide ? from_bf16(s + 32 + 16 * half) : _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(s + 16 + 8 * half))));
}

INLINE __m256 int4_result(__m256 product, __m256 shift, const float *base, const int wide) {
    return wide ? _mm256_add_ps(product, shift) : _mm256_fmadd_ps(shift, _mm256_set1_ps(base[1]), _mm256_mul_ps(product, _mm256_set1_ps(base[0])));
}

INLINE void int4(const struct fedtune_weights *w, int64_t block, const int8_t *x, const struct columns *xg, const int rows, float *out, int64_t stride, const int wide) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; half++) {
        const uint8_t *p = w->codes + block * groups * 256 + 32 * half, *s = w->scales + block * groups * (wide ? 64 : 32);
        __m256 product[AT_ONCE], shift[AT_ONCE];
        for (int r = 0; r < rows; r++)
            product[r] = shift[r] = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; g++, p += 256, s += wide ? 64 : 32) {
            __m256 scale = int4_scale(s, half, wide), zero = int4_zero(s, half, wide);
            __m256i sums[AT_ONCE];
            for (int r = 0; r < rows; r++)
                sums[r] = _mm256_setzero_si256();
            for (int j = 0; j < 4; j++) {
                __m256i both = _mm256_loadu_si256((const void *)(p + 64 * j));
                __m256i a = _mm256_and_si256(both, low), b = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                for (int r = 0; r < rows; r++) { /* eight sums of two products fit 16 bits: 16 * 15 * 127 < 2^15 */
                    const int8_t *c = x + r * width + g * GROUP + 4 * j;
                    sums[r] = _mm256_add_epi16(sums[r], _mm256_add_epi16(_mm256_maddubs_epi16(a, four_of(c)), _mm256_maddubs_epi16(b, four_of(c + 16))));
                }
            }
            for (int r = 0; r < rows; r++) {
                const struct columns *own = xg + r * groups + g;
                __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(sums[r], ones), _mm256_set1_epi32(own->minus_8));
                product[r] = _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_set1_ps(own->scale)), _mm256_cvtepi32_ps(dot), product[r]);
                shift[r] = _mm256_fmadd_ps(zero, _mm256_set1_ps(own->sum), shift[r]);
            }
        }
        for (int r = 0; r < rows; r++)
            _mm256_storeu_ps(out + r * stride + 8 * half, int4_result(product[r], shift[r], w->base + 2 * block, wide));
    }
}

INLINE void int8(const struct fedtune_weights *w, int64_t block, const int8_t *x, const struct columns *xg, const int rows, float *out, int64_t stride) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const __m256i middle = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; half++) {
        const uint8_t *p = w->codes + block * groups * 512 + 32 * half;
        __m256 product[AT_ONCE];
        for (int r = 0; r < rows; r++)
            product[r] = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; g++, p += 512) {
            __m256i sums[AT_ONCE];
            for (int r = 0; r < rows; r++)
                sums[r] = _mm256_setzero_si256();
            for (int j = 0; j < 8; j++) { /* |w| and x with w's sign: two products fit 16 bits, as both are at most 127 */
                __m256i code = _mm256_xor_si256(_mm256_loadu_si256((const void *)(p + 64 * j)), middle), size = _mm256_abs_epi8(code);
                for (int r = 0; r < rows; r++) {
                    __m256i c = four_of(x + r * width + g * GROUP + 4 * j);
                    sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(c, code)), ones));
                }
            }
            for (int r = 0; r < rows; r++)
                product[r] = _mm256_fmadd_ps(_mm256_set1_ps(xg[r * groups + g].scale), _mm256_cvtepi32_ps(sums[r]), product[r]);
        }
        for (int r = 0; r < rows; r++)
            _mm256_storeu_ps(out + r * stride + 8 * half, _mm256_mul_ps(product[r], _mm256_loadu_ps(w->base + BLOCK * block + 8 * half)));
    }
}

INLINE void bf16(const struct fedtune_weights *w, int64_t block, const uint16_t *x, const int rows, float *out, int64_t stride) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    for (int half = 0; half < 2; half++) {
        const uint8_t *p = w->codes + block * groups * 1024 + 32 * half;
        __m256 even[AT_ONCE], odd[AT_ONCE];
        for (int r = 0; r < rows; r++)
            even[r] = odd[r] = _mm256_setzero_ps();
        for (int64_t j = 0; j < width / 2; j++, p += 64) {
            __m256i two = _mm256_loadu_si256((const void *)p);
            __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(two, 16)), second = _mm256_castsi256_ps(_mm256_and_si256(two, high));
            for (int r = 0; r < rows; r++) {
                __m256i c = four_of(x + r * width + 2 * j);
                even[r] = _mm256_fmadd_ps(first, _mm256_castsi256_ps(_mm256_slli_epi32(c, 16)), even[r]);
                odd[r] = _mm256_fmadd_ps(second, _mm256_castsi256_ps(_mm256_and_si256(c, high)), odd[r]);
            }
        }
        for (int r = 0; r < rows; r++)
            _mm256_storeu_ps(out + r * stride + 8 * half, _mm256_add_ps(even[r], odd[r]));
    }
}

#include "forms.h"

#define INT4_OF(n, together, own) int4(w, own, x, xg, n, out, stride, 0)
#define WIDE_OF(n, together, own) int4(w, own, x, xg, n, out, stride, 1)
#define INT8_OF(n, together, own) int8(w, own, x, xg, n, out, stride)
#define BF16_OF(n, together, own) bf16(w, own, x, n, out, stride)
FORMS(int4_tile, AVX2_CODE, int8_t, AT_ONCE, INT4_OF)
FORMS(wide_tile, AVX2_CODE, int8_t, AT_ONCE, WIDE_OF)
FORMS(int8_tile, AVX2_CODE, int8_t, AT_ONCE, INT8_OF)
FORMS(bf16_tile, AVX2_CODE, uint16_t, AT_ONCE, BF16_OF)

const struct kernels fedtune_avx2 = {to_int8, to_bf16, copy_row, {int4_tile, wide_tile, int8_tile, bf16_tile, plain_tile}, &operations};

#ifdef HAS_AVXVNNI
#include "avxvnni.h"
#endif
#endif
