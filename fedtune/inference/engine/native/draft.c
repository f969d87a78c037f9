/* Draft tokens, one after the other, without a return to Python: a small model's passes are shorter than what Python does between them. */
#include <stdlib.h>

#include "kernels.h"

static int draft_fits(const struct fedtune_decoder *d, const struct fedtune_pass *p, const struct fedtune_draft *draft) {
    return p->span_count == 1 && p->spans && !p->spans->ring && !p->spans->codes && !p->spans->fork_count && p->turns_count > 0 && p->turns &&
           p->hidden && p->logits && p->kept_count == 1 && p->kept && *p->kept == p->rows - 1 && draft->embedding && draft->tokens &&
           draft->chances && draft->most > 0 && draft->vocabulary > 1 && draft->vocabulary <= d->head.n_out && draft->penalty > 0 &&
           draft->kind >= FLOATS && draft->kind <= FLOAT16S;
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float half_of(const char *at, int64_t kind) { /* memcpy, because a table may be unaligned */
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    if (kind == BFLOAT16S)
        return float_of((uint32_t)bits << 16);
    return float_of((uint32_t)(bits & 0x7fff) << 13) * 0x1p112f * (bits & 0x8000 ? -1 : 1); /* the exponent biases differ by 112 */
}

static void embed(const struct fedtune_draft *draft, int64_t token, float *out, int64_t n) {
    const char *table = draft->embedding;
    for (int64_t i = 0, at = token * n; i < n; i++, at++) {
        if (draft->kind == FLOATS)
            memcpy(out + i, table + 4 * at, sizeof *out);
        else
            out[i] = half_of(table + 2 * at, draft->kind);
        out[i] *= draft->embed_scale;
    }
}

static void penalize(const struct fedtune_draft *draft, float *logits) {
    for (int64_t i = 0; i < draft->vocabulary; i++)
        if (draft->seen[i])
            logits[i] = logits[i] > 0 ? logits[i] / draft->penalty : logits[i] * draft->penalty;
}

int fedtune_draft_run(const struct fedtune_decoder *decoder, const struct fedtune_pass *pass, struct fedtune_draft *draft,
                      const struct kernels *kernels, int threads) {
    if (!draft_fits(decoder, pass, draft))
        return BAD_SIZE;
    const float **turns = malloc((size_t)pass->turns_count * sizeof *turns);
    if (!turns)
        return NO_MEMORY;
    memcpy(turns, pass->turns, (size_t)pass->turns_count * sizeof *turns);
    struct fedtune_pass step = *pass;
    struct fedtune_span span = *pass->spans;
    const int64_t kept = 0;
    int failed;
    float chance = 1;
    step.spans = &span, step.turns = turns, draft->made = 0;
    while (!(failed = fedtune_pass_run(decoder, &step, kernels, threads))) {
        int64_t *tokens = draft->tokens + 2 * draft->made;
        float *chances = draft->chances + 2 * draft->made;
        if (draft->seen)
            penalize(draft, step.logits);
        kernels->operations->two_best(step.logits, draft->vocabulary, draft->sharpness, tokens, chances);
        float known = chances[0] * draft->trust;
        chance *= known > 1 ? 1 : known;
        if (++draft->made == draft->most || !(chance >= draft->least))
            break;
        if (draft->seen)
            draft->seen[tokens[0]] = 1;
        embed(draft, tokens[0], step.hidden, decoder->hidden);
        for (int64_t i = 0; i < step.turns_count; i++)
            turns[i] += step.rows * decoder->head_dim;
        span.length += span.rows, span.rows = step.rows = 1, step.kept = &kept;
    }
    free(turns);
    return failed;
}
