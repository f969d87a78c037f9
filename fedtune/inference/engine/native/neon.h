/* The products of int4 and int8. neon.c includes this once for dotprod and once for i8mm: only NAMED(int4_dots) and NAMED(int8_dots) differ. */

PRODUCT void NAMED(int4)(const struct fedtune_weights *w, int64_t block, const int8_t *x, const struct columns *xg, const int rows, float *out, int64_t stride, const int wide) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const int vectors = rows > 2 ? 2 : 4; /* of 4 outputs, whose sums fit in the registers */
    for (int first = 0; first < 4; first += vectors) {
        const uint8_t *p = w->codes + block * groups * 256 + 16 * first, *s = w->scales + block * groups * (wide ? 64 : 32);
        float32x4_t product[AT_ONCE][4], shift[AT_ONCE][4];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                product[r][v] = shift[r][v] = vdupq_n_f32(0);
        for (int64_t g = 0; g < groups; g++, p += 256, s += wide ? 64 : 32) {
            int32x4_t dots[AT_ONCE][4];
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < vectors; v++)
                    dots[r][v] = vdupq_n_s32(xg[r * groups + g].minus_8);
            NAMED(int4_dots)(p, x + g * GROUP, width, rows, vectors, dots);
            float32x4_t scale[4], zero[4];
            int4_scales(s, first, vectors / 2, wide, scale, zero);
            for (int r = 0; r < rows; r++) {
                const struct columns *own = xg + r * groups + g;
                for (int v = 0; v < vectors; v++) {
                    product[r][v] = vfmaq_f32(product[r][v], vmulq_n_f32(scale[v], own->scale), vcvtq_f32_s32(dots[r][v]));
                    shift[r][v] = vfmaq_n_f32(shift[r][v], zero[v], own->sum);
                }
            }
        }
        const float *base = w->base + 2 * block;
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                vst1q_f32(out + r * stride + 4 * (first + v), wide ? vaddq_f32(product[r][v], shift[r][v])
                                                                  : vfmaq_n_f32(vmulq_n_f32(product[r][v], base[0]), shift[r][v], base[1]));
    }
}

PRODUCT void NAMED(int8)(const struct fedtune_weights *w, int64_t block, const int8_t *x, const struct columns *xg, const int rows, float *out, int64_t stride) {
    const int64_t groups = groups_of(w->n_in), width = groups * GROUP;
    const int vectors = rows > 2 ? 2 : 4;
    for (int first = 0; first < 4; first += vectors) {
        const uint8_t *p = w->codes + block * groups * 512 + 16 * first;
        float32x4_t product[AT_ONCE][4];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                product[r][v] = vdupq_n_f32(0);
        for (int64_t g = 0; g < groups; g++, p += 512) {
            int32x4_t dots[AT_ONCE][4];
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < vectors; v++)
                    dots[r][v] = vdupq_n_s32(0);
            NAMED(int8_dots)(p, x + g * GROUP, width, rows, vectors, dots);
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < vectors; v++)
                    product[r][v] = vfmaq_n_f32(product[r][v], vcvtq_f32_s32(dots[r][v]), xg[r * groups + g].scale);
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                vst1q_f32(out + r * stride + 4 * (first + v), vmulq_f32(product[r][v], vld1q_f32(w->base + BLOCK * block + 4 * (first + v))));
    }
}

#define INT4_OF(n, together, own) NAMED(int4)(w, own, x, xg, n, out, stride, 0)
#define WIDE_OF(n, together, own) NAMED(int4)(w, own, x, xg, n, out, stride, 1)
#define INT8_OF(n, together, own) NAMED(int8)(w, own, x, xg, n, out, stride)
FORMS(NAMED(int4_tile), PRODUCT_CODE, int8_t, AT_ONCE, INT4_OF)
FORMS(NAMED(wide_tile), PRODUCT_CODE, int8_t, AT_ONCE, WIDE_OF)
FORMS(NAMED(int8_tile), PRODUCT_CODE, int8_t, AT_ONCE, INT8_OF)
#undef INT4_OF
#undef WIDE_OF
#undef INT8_OF
