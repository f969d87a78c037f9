/* The products of int4 and int8 on CPUs with a 256-bit integer dot product (AVX-VNNI), but without AVX-512; part of avx2.c, which has the rest. */
#define VNNI_CODE __attribute__((target("avx2,fma,avxvnni")))
#define VNNI_INLINE static inline __attribute__((always_inline)) VNNI_CODE

VNNI_INLINE void int4_by_vnni(const struct fedtune_weights *w, int64_t block, const int8_t *x, const struct columns *xg, const int rows, float *out, int64_t stride, const int wide) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const __m256i low = _mm256_set1_epi8(15);
    for (int half = 0; half < 2; half++) {
        const uint8_t *p = w->codes + block * groups * 256 + 32 * half, *s = w->scales + block * groups * (wide ? 64 : 32);
        __m256 product[AT_ONCE], shift[AT_ONCE];
        for (int r = 0; r < rows; r++)
            product[r] = shift[r] = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; g++, p += 256, s += wide ? 64 : 32) {
            __m256i one[AT_ONCE], two[AT_ONCE];
            for (int r = 0; r < rows; r++)
                one[r] = four_of(&xg[r * groups + g].minus_8), two[r] = _mm256_setzero_si256();
            for (int j = 0; j < 4; j++) {
                __m256i both = _mm256_loadu_si256((const void *)(p + 64 * j));
                __m256i a = _mm256_and_si256(both, low), b = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                for (int r = 0; r < rows; r++) {
                    const int8_t *c = x + r * width + g * GROUP + 4 * j;
                    one[r] = _mm256_dpbusd_avx_epi32(one[r], a, four_of(c));
                    two[r] = _mm256_dpbusd_avx_epi32(two[r], b, four_of(c + 16));
                }
            }
            __m256 scale = int4_scale(s, half, wide), zero = int4_zero(s, half, wide);
            for (int r = 0; r < rows; r++) {
                const struct columns *own = xg + r * groups + g;
                __m256 dot = _mm256_cvtepi32_ps(_mm256_add_epi32(one[r], two[r]));
                product[r] = _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_set1_ps(own->scale)), dot, product[r]);
                shift[r] = _mm256_fmadd_ps(zero, _mm256_set1_ps(own->sum), shift[r]);
            }
        }
        for (int r = 0; r < rows; r++)
            _mm256_storeu_ps(out + r * stride + 8 * half, int4_result(product[r], shift[r], w->base + 2 * block, wide));
    }
}

VNNI_INLINE void int8_by_vnni(const struct fedtune_weights *w, int64_t block, const int8_t *x, const struct columns *xg, const int rows, float *out, int64_t stride) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    for (int half = 0; half < 2; half++) {
        const uint8_t *p = w->codes + block * groups * 512 + 32 * half;
        __m256 product[AT_ONCE];
        for (int r = 0; r < rows; r++)
            product[r] = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; g++, p += 512) {
            __m256i one[AT_ONCE], two[AT_ONCE];
            for (int r = 0; r < rows; r++)
                one[r] = four_of(&xg[r * groups + g].minus_128), two[r] = _mm256_setzero_si256();
            for (int j = 0; j < 8; j += 2) {
                __m256i a = _mm256_loadu_si256((const void *)(p + 64 * j)), b = _mm256_loadu_si256((const void *)(p + 64 * j + 64));
                for (int r = 0; r < rows; r++) {
                    const int8_t *c = x + r * width + g * GROUP + 4 * j;
                    one[r] = _mm256_dpbusd_avx_epi32(one[r], a, four_of(c));
                    two[r] = _mm256_dpbusd_avx_epi32(two[r], b, four_of(c + 4));
                }
            }
            for (int r = 0; r < rows; r++) {
                __m256 dot = _mm256_cvtepi32_ps(_mm256_add_epi32(one[r], two[r]));
                product[r] = _mm256_fmadd_ps(_mm256_set1_ps(xg[r * groups + g].scale), dot, product[r]);
            }
        }
        for (int r = 0; r < rows; r++)
            _mm256_storeu_ps(out + r * stride + 8 * half, _mm256_mul_ps(product[r], _mm256_loadu_ps(w->base + BLOCK * block + 8 * half)));
    }
}

#define INT4_BY_VNNI(n, together, own) int4_by_vnni(w, own, x, xg, n, out, stride, 0)
#define WIDE_BY_VNNI(n, together, own) int4_by_vnni(w, own, x, xg, n, out, stride, 1)
#define INT8_BY_VNNI(n, together, own) int8_by_vnni(w, own, x, xg, n, out, stride)
FORMS(int4_vnni_tile, VNNI_CODE, int8_t, AT_ONCE, INT4_BY_VNNI)
FORMS(wide_vnni_tile, VNNI_CODE, int8_t, AT_ONCE, WIDE_BY_VNNI)
FORMS(int8_vnni_tile, VNNI_CODE, int8_t, AT_ONCE, INT8_BY_VNNI)

const struct kernels fedtune_avxvnni = {to_int8, to_bf16, copy_row, {int4_vnni_tile, wide_vnni_tile, int8_vnni_tile, bf16_tile, plain_tile}, &operations};
