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

enum {
    QUERIES = 16,                       /* most queries of attend_tile */
    SIDE_BY_SIDE = LANES == 8 ? 2 : 4,  /* queries whose sums of values fit in the registers together */
    SCORES = TOKENS + LANES,            /* scores of a query in a tile; the last vector may reach beyond the tokens */
};

/* A row's query of one head, over tokens first .. end - 1 of a tile. The softmax over the earlier tiles: the largest score
 * `most`, the sum of the exponentials `total`, and `out` [width], the sum of the values times their exponentials. */
struct query {
    const float *q;
    float *most, *total, *out;
    int first, end;
};

/* Writes the scores of the query's tokens. Returns the largest score of these and the earlier tiles' tokens. */
SMALL float score(const struct attention *a, const struct query *own, const float *const *keys, const int64_t width, float *scores) {
    const int64_t whole = width / LANES * LANES;
    vec q[MOST_WIDTH / LANES], top = all(*own->most);
    for (int64_t i = 0; i < width; i += LANES)
        q[i / LANES] = load_upto(own->q + i, width - i);
    for (int t = own->first; t < own->end; t += LANES) { /* LANES tokens at a time; the last ones may be beyond the end */
        const int left = own->end - t;
        vec products[LANES];
        for (int k = 0; k < LANES; k++) {
            const float *key = keys[t + k];
            vec one = {0}, two = {0};
            int64_t i = 0;
            if (whole >= 2 * LANES)
                one = q[0] * load(key), two = q[1] * load(key + LANES), i = 2 * LANES;
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
        top = larger_of(left < LANES ? choose(lanes() < left, sums, top) : sums, top);
        store(scores + t, sums);
    }
    return most_of_lanes(top);
}

/* Replaces each score by exp(score - highest). Returns the sum. */
SMALL float weigh(const struct query *own, float highest, float *scores) {
    vec sum = {0};
    for (int t = own->first; t < own->end; t += LANES) {
        vec v = exp_of(load(scores + t) - highest);
        store(scores + t, v);
        sum = sum + (own->end - t < LANES ? (vec)((ints)v & (lanes() < own->end - t)) : v);
    }
    return sum_of_lanes(sum);
}

/* Adds the values of tokens t .. end - 1, times their exponentials, to `vectors` vectors of channels from `channel`; `vectors` is a constant. */
SMALL void add_values(vec *sums, const float *const *values, const float *scores, int t, int end, int64_t channel, const int vectors) {
    for (; t < end; t++)
        for (int k = 0; k < vectors; k++)
            sums[k] = fused(all(scores[t]), load(values[t] + channel + k * LANES), sums[k]);
}

/* Multiplies each query's `out` by `old` and adds its values, for all channels and n queries; n is a constant. Most queries have the same tokens,
 * whose values, low .. high - 1, are added to all n queries together. */
SMALL void add_all(const struct query *own, const int n, const float *const *values, const int64_t width, float (*scores)[SCORES], const float *old) {
    const int64_t whole = width / LANES * LANES;
    int low = 0, high = TOKENS;
    int64_t i = 0;
    for (int j = 0; j < n; j++)
        low = own[j].first > low ? own[j].first : low, high = own[j].end < high ? own[j].end : high;
    for (; i + 4 * LANES <= whole; i += 4 * LANES) {
        vec sums[SIDE_BY_SIDE][4];
        for (int j = 0; j < n; j++) {
            for (int k = 0; k < 4; k++)
                sums[j][k] = load(own[j].out + i + k * LANES) * old[j];
            add_values(sums[j], values, scores[j], own[j].first, low < own[j].end ? low : own[j].end, i, 4);
        }
        for (int t = low; t < high; t++)
            for (int j = 0; j < n; j++)
                add_values(sums[j], values, scores[j], t, t + 1, i, 4);
        for (int j = 0; j < n; j++) {
            const int seen = low < own[j].end ? low : own[j].end;
            add_values(sums[j], values, scores[j], high > seen ? high : seen, own[j].end, i, 4);
            for (int k = 0; k < 4; k++)
                store(own[j].out + i + k * LANES, sums[j][k]);
        }
    }
    for (int j = 0; j < n; j++) {
        int64_t at = i;
        for (; at < whole; at += LANES) {
            vec sum = load(own[j].out + at) * old[j];
            add_values(&sum, values, scores[j], own[j].first, own[j].end, at, 1);
            store(own[j].out + at, sum);
        }
        for (; at < width; at++) {
            float sum = own[j].out[at] * old[j];
            for (int t = own[j].first; t < own[j].end; t++)
                sum += scores[j][t] * values[t][at];
            own[j].out[at] = sum;
        }
    }
}

/* Adds a tile to the softmax of n queries. Each step runs for all queries before the next step, so that the processor need not wait for a result. */
SMALL void attend_tile(const struct attention *a, const struct query *own, int n, const float *const *keys, const float *const *values,
                       const int64_t width) {
    float scores[QUERIES][SCORES] __attribute__((aligned(64))), highest[QUERIES] = {0}, old[QUERIES] = {0};
    int j;
    for (j = 0; j < n; j++)
        old[j] = *own[j].most, highest[j] = score(a, own + j, keys, width, scores[j]);
    for (j = 0; j < n; j += LANES) { /* the factors of the earlier sums */
        vec before = load(old + j), now = load(highest + j);
        store(old + j, choose(before == now, all(1), exp_of(before - now))); /* both may be -infinity */
    }
    for (j = 0; j < n; j++) {
        *own[j].most = highest[j];
        *own[j].total = *own[j].total * old[j] + weigh(own + j, highest[j], scores[j]);
    }
    for (j = 0; j + SIDE_BY_SIDE <= n; j += SIDE_BY_SIDE)
        add_all(own + j, SIDE_BY_SIDE, values, width, scores + j, old + j);
    for (; j < n; j++)
        add_all(own + j, 1, values, width, scores + j, old + j);
}

/* Calls attend_tile with the two common widths as constants, so that the query stays in registers. */
CODE static void attend_tile_of(const struct attention *a, const struct query *own, int n, const float *const *keys, const float *const *values) {
    if (a->width == 64)
        attend_tile(a, own, n, keys, values, 64);
    else if (a->width == 128)
        attend_tile(a, own, n, keys, values, 128);
    else
        attend_tile(a, own, n, keys, values, a->width);
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
    if (a->halves && !a->codes && !a->blocks && !a->ring) { /* the tokens are in consecutive slots */
        const uint16_t *own = (const uint16_t *)entries + (from - a->first) * a->token_stride;
        for (int t = 0; t < count; t++, own += a->token_stride)
            found[t] = space + t * a->width, floats_of_halves(own, space + t * a->width, a->width);
        return;
    }
    for (int t = 0; t < count; t++) {
        const int64_t at = from + t;
        float *own = space + t * a->width;
        found[t] = own;
        if (at < coded) { /* as many tokens as are in the same group */
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

/* The position of a row in its sequence. */
SMALL int64_t position_of(const struct attention *a, int64_t row) { return a->length + (row < a->chain ? row : a->forks[row - a->chain] + 1); }

/* Attention of rows row .. row + rows - 1 to tokens low .. end - 1, tile by tile. In a tile each row attends to the tokens that it sees. */
SMALL void attend_range(const struct attention *a, int64_t row, int rows, int64_t low, int64_t end, int is_sinks, float *space, float *most,
                        float *total) {
    const float *keys[TOKENS + LANES], *values[TOKENS]; /* score() reads up to LANES keys beyond the tokens: copies of the last one */
    struct query queries[QUERIES];
    const int copies = a->halves || a->codes || a->ring, shared = a->shared;
    float *own = space + (copies ? 2 * TOKENS * a->width : 0); /* a fork's key and value */
    for (int64_t tile = low / TOKENS * TOKENS; tile < end; tile += TOKENS) { /* tiles begin at fixed positions */
        const int64_t start = larger(tile, low);
        const int count = (int)(smaller(tile + TOKENS, end) - start);
        int64_t coded = -1, moved = -1; /* find_tokens' arguments for the tokens in `keys` and `values` */
        int n = 0;
        for (int r = 0; r < rows; r++) {
            const int64_t at = position_of(a, row + r), oldest = is_sinks || !a->window ? 0 : at - a->window + 1;
            const int from = (int)smaller(larger(oldest - start, 0), count), to = (int)smaller(at + 1 - start, count);
            if (from >= to)
                continue;
            const int64_t edge = a->codes ? smaller(larger(at + 1 - a->residual, 0) / a->codes->group * a->codes->group, end) : 0;
            const int64_t shift = a->ring ? larger(at - (a->sinks + a->window - 1), 0) : 0;
            const int64_t now = smaller(larger(edge, start), start + count);
            const int is_fork = row + r >= a->chain && at < start + count; /* then the last token that it sees is its own */
            if (n && (is_fork || now != coded || shift != moved))
                attend_tile_of(a, queries, n, keys, values), n = 0;
            if (now != coded || shift != moved) {
                find_tokens(a, 0, start, count, now, shift, space, keys);
                find_tokens(a, 1, start, count, now, shift, space + (copies ? TOKENS * a->width : 0), values);
                for (int t = count; t < count + LANES; t++)
                    keys[t] = keys[count - 1];
                coded = now, moved = shift;
            }
            const float *chain_key = keys[to - 1], *chain_value = values[to - 1];
            if (is_fork) {
                find_tokens(a, 0, a->length + row + r, 1, 0, 0, own, keys + to - 1);
                find_tokens(a, 1, a->length + row + r, 1, 0, 0, own + (copies ? a->width : 0), values + to - 1);
            }
            for (int h = 0; h < shared; h++) {
                queries[n++] = (struct query){a->q + (row + r) * a->q_stride + h * a->width, most + r * shared + h, total + r * shared + h,
                                              a->out + (row + r) * a->out_stride + h * a->width, from, to};
                if (n == QUERIES || (is_fork && h == shared - 1))
                    attend_tile_of(a, queries, n, keys, values), n = 0;
            }
            keys[to - 1] = chain_key, values[to - 1] = chain_value;
        }
        if (n)
            attend_tile_of(a, queries, n, keys, values);
    }
}

CODE static void attend(const struct attention *a, int64_t row, int rows) {
    float most[ROWS_AT_ONCE * MOST_SHARED], total[ROWS_AT_ONCE * MOST_SHARED];
    float space[a->halves || a->codes || a->ring ? 2 * (TOKENS + 1) * a->width : 1] __attribute__((aligned(64)));
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
