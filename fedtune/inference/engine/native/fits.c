/* The checks of everything that a pass reads and writes. A pass that is refused changes nothing. */
#include <stddef.h>

#include "fits.h"

enum { MOST_ROWS = 1 << 20, MOST_SIZE = 1 << 24, MOST_LAYERS = 4096 };

static int all_present(void *const *pointers, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!pointers[i])
            return 0;
    return 1;
}

static int lora_fits(const struct fedtune_decoder *d, const struct fedtune_lora *lora) {
    if (lora->layers != d->layers || lora->count < 0 || !lora->starts || lora->starts[0] != 0 || lora->starts[d->layers] != lora->count ||
        (lora->count && !lora->pieces))
        return 0;
    for (int64_t i = 0; i < d->layers; i++) {
        if (lora->starts[i] > lora->starts[i + 1] || lora->starts[i + 1] > lora->count)
            return 0;
        int64_t ranks = 0;
        for (const struct fedtune_lora_piece *p = lora->pieces + lora->starts[i]; p < lora->pieces + lora->starts[i + 1]; p++) {
            if (p->linear < 0 || p->linear >= LINEARS || p->rank < 1 || p->rank > MOST_SIZE || !p->a || !p->b)
                return 0;
            const struct fedtune_weights *w = linear_of(d->layer + i, p->linear);
            if (p->n_in != w->n_in || p->n < 1 || p->n > w->n_out || p->first < 0 || p->first > w->n_out - p->n)
                return 0;
            if ((ranks += p->rank) > MOST_SIZE)
                return 0;
        }
    }
    return 1;
}

/* Whether tokens 0 .. rows + length - 1 of every head lie within the entries. */
static int span_fits(const struct fedtune_decoder *d, const struct fedtune_span *s) {
    if (s->rows < 1 || s->rows > MOST_ROWS || s->length < 0 || s->length > INT32_MAX || s->token_stride < d->head_dim ||
        s->token_stride > INT32_MAX || s->head_stride < 0 || s->entries < 0 || !s->keys || !s->values)
        return 0;
    if (!all_present(s->keys, d->layers) || !all_present(s->values, d->layers))
        return 0;
    int64_t tokens = s->length + s->rows, last = tokens - 1, heads;
    if (s->codes) {
        int64_t least = tokens - s->residual, seen = s->length + 1 - s->residual;
        if ((s->bits != 2 && s->bits != 4 && s->bits != 8) || s->group < 1 || s->group > MOST_SIZE || s->group * s->bits % 8 ||
            s->values_together < 1 || s->residual < 1 || s->residual > MOST_SIZE || s->blocks || s->ring || s->first < 0 ||
            s->groups < (least > 0 ? least / s->group : 0) || s->first > (seen > 0 ? seen / s->group * s->group : 0) ||
            (s->groups && !all_present(s->codes, 6 * d->layers)))
            return 0;
        last -= s->first;
    } else if (s->ring) {
        if (s->ring < 1 || s->ring > MOST_SIZE || s->sinks < 0 || s->sinks > MOST_SIZE || s->window < 1 || s->window > MOST_SIZE || s->blocks ||
            (s->ring < s->window - 1 + s->rows && tokens > s->sinks + s->ring)) /* then a row would lose what it sees */
            return 0;
        last = s->sinks + s->ring - 1 < last ? s->sinks + s->ring - 1 : last;
    } else if (s->blocks) {
        if (s->block < 1 || s->block > MOST_ROWS || s->block_count < (tokens + s->block - 1) / s->block)
            return 0;
        last = 0;
        for (int64_t i = 0; i < (tokens + s->block - 1) / s->block; i++) {
            if (s->blocks[i] < 0)
                return 0;
            int64_t slot = s->blocks[i] * s->block + s->block - 1;
            last = slot > last ? slot : last;
        }
    }
    if (!s->codes && s->first)
        return 0;
    if (s->fork_count) {
        if (s->fork_count < 0 || s->fork_count > s->rows - 2 || !s->forks || s->codes || s->ring)
            return 0;
        for (int64_t i = 0; i < s->fork_count; i++)
            if (s->forks[i] < 0 || s->forks[i] > s->rows - s->fork_count - 2)
                return 0;
    }
    return !__builtin_mul_overflow(d->kv_heads - 1, s->head_stride, &heads) && last <= INT64_MAX / 4 / s->token_stride &&
           heads <= INT64_MAX / 4 && last * s->token_stride + heads + d->head_dim <= s->entries;
}

static int is_linear(const struct fedtune_weights *w, int64_t n_in, int64_t n_out) {
    return fedtune_weights_fit(w) && w->n_in == n_in && w->n_out == n_out;
}

int fedtune_decoder_fits(const struct fedtune_decoder *d) {
    const int64_t sizes[] = {d->hidden, d->heads, d->kv_heads, d->head_dim, d->intermediate};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i] < 1 || sizes[i] > MOST_SIZE)
            return 0;
    if (d->layers < 1 || d->layers > MOST_LAYERS || !d->layer || d->heads % d->kv_heads || d->heads / d->kv_heads > MOST_SHARED ||
        d->head_dim % 2 || d->head_dim > MOST_WIDTH)
        return 0;
    int64_t queries = d->heads * d->head_dim, keys = d->kv_heads * d->head_dim;
    if (queries > MOST_SIZE || keys > MOST_SIZE)
        return 0;
    for (int64_t i = 0; i < d->layers; i++) {
        const struct fedtune_layer *l = d->layer + i;
        if (!is_linear(&l->qkv, d->hidden, queries + 2 * keys) || !is_linear(&l->o, queries, d->hidden) ||
            !is_linear(&l->gate_up, d->hidden, 2 * d->intermediate) || !is_linear(&l->down, d->intermediate, d->hidden) || l->window < 0 ||
            !l->q_norm != !l->k_norm)
            return 0;
    }
    return 1;
}

/* Whether there is a rotation for each place of a ring, and each layer's window has room for the sinks. */
static int ring_fits(const struct fedtune_decoder *d, const struct fedtune_pass *p, const struct fedtune_span *s) {
    int64_t last = s->sinks + s->window - 1, end = s->length + s->rows - 1;
    if (!p->places || !all_present((void *const *)p->places, p->turns_count) || p->place_count <= (end < last ? end : last))
        return 0;
    for (int64_t i = 0; i < d->layers; i++)
        if (window_of(s, d->layer + i) < 1)
            return 0;
    return 1;
}

int fedtune_pass_fits(const struct fedtune_decoder *d, const struct fedtune_pass *p) {
    if (p->rows < 1 || p->rows > MOST_ROWS || p->first < 0 || p->first > p->last || p->last > d->layers || !p->hidden || p->span_count < 1 ||
        p->span_count > p->rows || !p->spans || p->turns_count < 1 || !p->turns || !all_present((void *const *)p->turns, p->turns_count))
        return 0;
    int64_t rows = 0;
    for (int64_t i = 0; i < p->span_count; i++) {
        if (!span_fits(d, p->spans + i) || (p->spans[i].lora && !lora_fits(d, p->spans[i].lora)))
            return 0;
        rows += p->spans[i].rows;
    }
    for (int64_t i = 0; i < d->layers; i++)
        if (d->layer[i].turns < 0 || d->layer[i].turns >= p->turns_count)
            return 0;
    for (int64_t i = 0; i < p->span_count; i++)
        if (p->spans[i].ring && !ring_fits(d, p, p->spans + i))
            return 0;
    if (p->logits) {
        if (p->kept_count < 1 || p->kept_count > p->rows || !p->kept || !d->norm || !fedtune_weights_fit(&d->head) || d->head.n_in != d->hidden)
            return 0;
        for (int64_t i = 0; i < p->kept_count; i++)
            if (p->kept[i] < 0 || p->kept[i] >= p->rows)
                return 0;
    }
    return rows == p->rows;
}
