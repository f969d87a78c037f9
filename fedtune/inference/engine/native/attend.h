/* Attention over full, paged, window and quantized caches, with forks. Included by rows.h, whose vectors it uses. */

SMALL void floats_of_halves(const uint16_t *from, float *to, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(to + i, (vec)((ints)ints_of_halves(from + i) << 16));
    for (; i < n; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, sizeof bits);
    }
}

/* Adds tokens first .. count - 1 of a tile to one query's running softmax: `most` is the largest score so far, `total` the sum of
 * exp(score - most), and out [width] the sum of the values times exp(score - most). */
SMALL void attend_tile(const struct attention *a, const float *query, const float *const *keys, const float *const *values,
                       const int64_t width, int first, int count, float *most, float *total, float *out) {
    const int64_t whole = width / LANES * LANES;
    float scores[TOKENS];
    vec q[MOST_WIDTH / LANES];
    for (int64_t i = 0; i < width; i += LANES)
        q[i / LANES] = load_upto(query + i, width - i);
    vec top = (vec){0} + *most;
    for (int t = first; t < count; t += LANES) { /* the scores of LANES tokens at a time; after the last token, token t stands in */
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

/* attend_tile with a constant number of channels for the common ones, so that the query stays in registers. */
CODE static void attend_tile_of(const struct attention *a, const float *query, const float *const *keys, const float *const *values, int first,
                                int count, float *most, float *total, float *out) {
    if (a->width == 64)
        attend_tile(a, query, keys, values, 64, first, count, most, total, out);
    else if (a->width == 128)
        attend_tile(a, query, keys, values, 128, first, count, most, total, out);
    else
        attend_tile(a, query, keys, values, a->width, first, count, most, total, out);
}

/* float16 to float32: the exponent biases differ by 112. Subnormals (below 2^-14) come out right, too; infinities do not occur. */
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

/* Dequantizes the keys (or values) of tokens token .. token + count - 1, which are in one group. */
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

/* Points `found` at the keys (or values) of tokens from .. from + count - 1 as floats: in the cache itself, or in `space` after they were
 * dequantized, widened from bfloat16 or rotated. Tokens below `coded` are codes. Keys of a ring are rotated by their place, which is their
 * position minus `moved`, or for a sink its position. */
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
        if (a->ring && !values) { /* limited to the table: a token that this row does not see may have a place outside of it */
            const int64_t place = at < a->sinks ? at : smaller(larger(at - moved, 0), a->sinks + a->window - 1);
            rotate(own, a->places + place * a->width, a->width / 2, 1);
        }
    }
}

/* The position of a row in the text. */
SMALL int64_t position_of(const struct attention *a, int64_t row) { return a->length + (row < a->chain ? row : a->forks[row - a->chain] + 1); }

/* Attention of rows row .. row + rows - 1 to tokens low .. end - 1, tile by tile. In a tile each row attends to the tokens that it sees. */
SMALL void attend_range(const struct attention *a, int64_t row, int rows, int64_t low, int64_t end, int is_sinks, float *space, float *most,
                        float *total) {
    const float *keys[TOKENS], *values[TOKENS];
    const int copies = a->halves || a->codes || a->ring, shared = a->shared;
    float *own = space + (copies ? 2 * TOKENS * a->width : 0); /* a fork's key and value */
    for (int64_t tile = low / TOKENS * TOKENS; tile < end; tile += TOKENS) { /* tiles begin at fixed positions */
        const int64_t start = larger(tile, low);
        const int count = (int)(smaller(tile + TOKENS, end) - start);
        int64_t coded = -1, moved = -1; /* arguments of the last find_tokens */
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
            const int is_fork = row + r >= a->chain && at < start + count; /* then its own token is the last that it sees */
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
