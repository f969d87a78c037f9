/* A pass of several sequences through a decoder's layers, and its logits: the native form of Decoder.forward in engine/decoder.py.
 *
 * Rows of all sequences go through the products together; attention goes sequence by sequence. A row's result does not depend on the other
 * rows. fits.c checks everything first.
 */
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "fits.h"

enum { FEW = 4, PIECE = 8 }; /* rows that one thread computes alone; rows of an item of work */
enum { SOME_RANKS = 8, SOME_COLUMNS = 256 }; /* ranks, and outputs, of an adapter in an item of work */

#ifdef FEDTUNE_STEPS /* CPU seconds of this thread in each step of a pass, for simulations/benchmarks/inference/steps.py */
#include <time.h>
EXPORTED double fedtune_steps[10];

static void end_step(int step) {
    static double before;
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    const double now = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    fedtune_steps[step] += now - before, before = now;
}
#else
#define end_step(step)
#endif
enum { REST = 0, ROWS = 1, QKV_STEP = 2, ROPE = 3, ATTENTION = 4, O_STEP = 5, GATE_UP_STEP = 6, ACTIVATION = 7, DOWN_STEP = 8, HEAD = 9 };

struct work {
    const struct fedtune_decoder *d;
    const struct fedtune_pass *p;
    const struct kernels *kernels;
    const struct operations *op;
    const struct fedtune_layer *layer;
    int64_t index;      /* of the layer */
    int64_t qkv_width;  /* floats of a row of qkv */
    int64_t *positions; /* [rows] */
    int64_t *owners;    /* [rows]: the span */
    int64_t *starts;    /* [spans]: the first row */
    float *x, *qkv, *attended, *y, *wide;
    int64_t linear; /* the linear whose adapters run, its input and output, and `shrunk` [rows, ranks], the products of the input with a */
    const float *input;
    int64_t input_stride, ranks;
    float *output, *shrunk;
    int64_t output_width;
    void *space;
    int threads;
};

static void for_rows(struct work *w, int64_t rows, void (*run)(void *, int64_t, int64_t)) {
    fedtune_pool_run(rows > FEW ? w->threads : 1, rows, rows > FEW * PIECE ? PIECE : FEW, run, w);
}

static void write_entries(const struct work *w, void *to, int64_t at, const float *from, int64_t n, int64_t halves) {
    if (halves)
        w->op->halve(from, n, (uint16_t *)to + at);
    else
        memcpy((float *)to + at, from, (size_t)n * sizeof *from);
}

/* Rounds a row of a linear's input while it is in the processor's cache. */
static void round_input(const struct work *w, const struct fedtune_layer *layer, int64_t linear, int64_t row, const float *x) {
    fedtune_round(linear_of(layer, linear), w->kernels, w->p->rows, row, x, w->space);
}

/* The input of a layer's first linear. */
static void begin_row(const struct work *w, const struct fedtune_layer *layer, int64_t row) {
    const int64_t n = w->d->hidden;
    if (layer->norm)
        w->op->norm(w->p->hidden + row * n, layer->norm, w->x + row * n, n, w->d->eps);
    round_input(w, layer, QKV, row, (layer->norm ? w->x : w->p->hidden) + row * n);
}

static void begin(void *argument, int64_t first, int64_t end) {
    const struct work *w = argument;
    for (int64_t i = first; i < end; i++)
        begin_row(w, w->layer, i);
}

static void norm_heads(const struct work *w, float *x, const float *weight, int64_t heads) {
    int64_t width = w->d->whole_norms ? heads * w->d->head_dim : w->d->head_dim;
    for (int64_t at = 0; at < heads * w->d->head_dim; at += width)
        w->op->norm(x + at, weight, x + at, width, w->d->eps);
}

/* Applies norms and rotations to queries and keys, scales the queries, and stores keys and values. */
static void prepare(void *argument, int64_t first, int64_t end) {
    const struct work *w = argument;
    const struct fedtune_decoder *d = w->d;
    const int64_t width = d->head_dim;
    for (int64_t i = first; i < end; i++) {
        const struct fedtune_span *s = w->p->spans + w->owners[i];
        float *q = w->qkv + i * w->qkv_width, *k = q + d->heads * width, *v = k + d->kv_heads * width;
        const int64_t at = w->positions[i], start = w->starts[w->owners[i]];
        const float *turns = w->p->turns[w->layer->turns] + (start + at - s->length) * width;
        const int64_t slot = slot_of(s->length + i - start, s->first, s->blocks, s->block, s->sinks, s->ring);
        if (s->ring) { /* keys are rotated when they are read */
            int64_t last = s->sinks + window_of(s, w->layer) - 1;
            turns = w->p->places[w->layer->turns] + (at < last ? at : last) * width;
        }
        if (w->layer->q_norm) {
            norm_heads(w, q, w->layer->q_norm, d->heads);
            norm_heads(w, k, w->layer->k_norm, d->kv_heads);
        }
        for (int64_t h = 0; h < d->heads; h++)
            w->op->rotate(q + h * width, turns, width / 2, d->query_scale);
        for (int64_t h = 0; h < d->kv_heads; h++) {
            if (!s->ring)
                w->op->rotate(k + h * width, turns, width / 2, 1);
            write_entries(w, s->keys[w->index], slot * s->token_stride + h * s->head_stride, k + h * width, width, s->halves);
            write_entries(w, s->values[w->index], slot * s->token_stride + h * s->head_stride, v + h * width, width, s->halves);
        }
    }
}

static struct codes codes_of(const struct fedtune_decoder *d, const struct fedtune_span *s, int64_t layer, int64_t head) {
    void *const *all = s->codes + 6 * layer;
    int64_t packed = head * s->groups * (s->group * s->bits / 8) * d->head_dim, a_group = head * s->groups * d->head_dim;
    int64_t a_token = head * s->groups * s->group * ((d->head_dim + s->values_together - 1) / s->values_together);
    return (struct codes){
        .keys = (const uint8_t *)all[0] + packed, .key_lows = (const uint16_t *)all[1] + a_group, .key_scales = (const uint16_t *)all[2] + a_group,
        .values = (const uint8_t *)all[3] + packed, .value_lows = (const uint16_t *)all[4] + a_token,
        .value_scales = (const uint16_t *)all[5] + a_token, .bits = s->bits, .group = s->group, .values_together = s->values_together,
    };
}

/* Rows of an item of attention: more in a long pass where few query heads share a key head, because an item decodes each key only once. */
static int64_t attended_together(const struct work *w) {
    return w->p->rows >= 4 * ROWS_AT_ONCE && w->d->heads < 4 * w->d->kv_heads ? ROWS_AT_ONCE : PIECE;
}

/* Items: for each key head, pieces of rows. The last rows come first, because they take longest. */
static void attend(void *argument, int64_t first, int64_t end) {
    const struct work *w = argument;
    const struct fedtune_decoder *d = w->d;
    const int64_t step = attended_together(w), pieces = (w->p->rows + step - 1) / step, shared = d->heads / d->kv_heads;
    for (int64_t item = first; item < end; item++) {
        int64_t head = item / pieces, row = (pieces - 1 - item % pieces) * step, stop = smaller(row + step, w->p->rows);
        while (row < stop) {
            int64_t owner = w->owners[row], start = w->starts[owner];
            const struct fedtune_span *s = w->p->spans + owner;
            int64_t last = start + s->rows < stop ? start + s->rows : stop;
            struct codes codes;
            struct attention a = {
                .keys = (const char *)s->keys[w->index] + head * s->head_stride * (s->halves ? 2 : 4),
                .values = (const char *)s->values[w->index] + head * s->head_stride * (s->halves ? 2 : 4),
                .token_stride = s->token_stride, .first = s->first, .blocks = s->blocks, .block = s->block, .sinks = s->sinks, .ring = s->ring,
                .places = s->ring ? w->p->places[w->layer->turns] : NULL, .residual = s->residual, .halves = (int)s->halves,
                .shared = (int)shared, .width = d->head_dim, .length = s->length, .window = window_of(s, w->layer), .cap = d->attention_cap,
                .q = w->qkv + start * w->qkv_width + head * shared * d->head_dim, .q_stride = w->qkv_width,
                .chain = s->rows - s->fork_count, .forks = s->forks,
                .out = w->attended + (start * d->heads + head * shared) * d->head_dim, .out_stride = d->heads * d->head_dim,
            };
            if (s->codes) {
                codes = codes_of(d, s, w->index, head);
                a.codes = &codes;
            }
            w->op->attend(&a, row - start, (int)(last - row));
            row = last;
        }
    }
}

static void round_attended(void *argument, int64_t first, int64_t end) {
    const struct work *w = argument;
    for (int64_t i = first; i < end; i++)
        round_input(w, w->layer, O, i, w->attended + i * w->d->heads * w->d->head_dim);
}

static void finish_attention(void *argument, int64_t first, int64_t end) {
    const struct work *w = argument;
    const int64_t n = w->d->hidden;
    for (int64_t i = first; i < end; i++) {
        float *hidden = w->p->hidden + i * n, *y = w->y + i * n;
        if (w->layer->o_norm)
            w->op->norm(y, w->layer->o_norm, y, n, w->d->eps);
        w->op->add(hidden, y, n);
        if (w->layer->mlp_norm)
            w->op->norm(hidden, w->layer->mlp_norm, w->x + i * n, n, w->d->eps);
        round_input(w, w->layer, GATE_UP, i, w->layer->mlp_norm ? w->x + i * n : hidden);
    }
}

static void activate(void *argument, int64_t first, int64_t end) {
    const struct work *w = argument;
    const int64_t n = w->d->intermediate;
    for (int64_t i = first; i < end; i++) {
        float *gate = w->wide + 2 * i * n;
        w->op->activate(gate, gate + n, gate, n, (int)w->d->gelu);
        round_input(w, w->layer, DOWN, i, gate);
    }
}

static void finish_mlp(void *argument, int64_t first, int64_t end) {
    const struct work *w = argument;
    const int64_t n = w->d->hidden;
    for (int64_t i = first; i < end; i++) {
        float *y = w->y + i * n;
        if (w->layer->down_norm)
            w->op->norm(y, w->layer->down_norm, y, n, w->d->eps);
        w->op->add(w->p->hidden + i * n, y, n);
        if (w->index + 1 < w->p->last)
            begin_row(w, w->layer + 1, i);
    }
}

/* The adapters' products of rows row .. stop - 1: with a, for ranks low .. high - 1; if `expands`, with b, for outputs low .. high - 1. */
static void adapt_tile(const struct work *w, int64_t row, int64_t stop, int64_t low, int64_t high, int expands) {
    while (row < stop) {
        const struct fedtune_lora *lora = w->p->spans[w->owners[row]].lora;
        int64_t end = row + 1, rank = 0;
        while (end < stop && w->p->spans[w->owners[end]].lora == lora)
            end++;
        for (int64_t i = lora ? lora->starts[w->index] : 0; lora && i < lora->starts[w->index + 1]; i++) {
            const struct fedtune_lora_piece *p = lora->pieces + i;
            if (p->linear != w->linear)
                continue;
            float *shrunk = w->shrunk + row * w->ranks + rank;
            const int64_t start = expands ? p->first : rank, count = expands ? p->n : p->rank;
            const int64_t from = larger(low - start, 0), n = smaller(high - start, count) - from;
            if (n > 0 && expands)
                w->op->expand(shrunk, w->ranks, end - row, p->b + from, p->n, p->rank, w->output + row * w->output_width + start + from,
                              w->output_width, n);
            else if (n > 0)
                w->op->shrink(w->input + row * w->input_stride, w->input_stride, end - row, p->a + from * p->n_in, p->n_in, n, shrunk + from,
                              w->ranks);
            rank += p->rank;
        }
        row = end;
    }
}

static void adapt_tiles(const struct work *w, int64_t first, int64_t end, int64_t width, int64_t step, int expands) {
    const int64_t tiles = (width + step - 1) / step;
    for (int64_t item = first; item < end; item++) {
        int64_t row = item / tiles * PIECE, low = item % tiles * step;
        adapt_tile(w, row, smaller(row + PIECE, w->p->rows), low, low + step, expands);
    }
}

static void shrink(void *argument, int64_t first, int64_t end) {
    const struct work *w = argument;
    adapt_tiles(w, first, end, w->ranks, SOME_RANKS, 0);
}

static void expand(void *argument, int64_t first, int64_t end) {
    const struct work *w = argument;
    adapt_tiles(w, first, end, w->output_width, SOME_COLUMNS, 1);
}

/* A linear, whose input is rounded, and the adapters of the rows that have one. */
static void product(struct work *w, int64_t linear, const float *x, int64_t stride, float *y) {
    const struct fedtune_weights *weights = linear_of(w->layer, linear);
    const int64_t pieces = (w->p->rows + PIECE - 1) / PIECE;
    fedtune_product_of_rounded(weights, w->kernels, w->threads, w->p->rows, y, w->space);
    w->ranks = 0;
    for (int64_t i = 0; i < w->p->span_count; i++)
        if (w->p->spans[i].lora)
            w->ranks = larger(w->ranks, ranks_of(w->p->spans[i].lora, w->index, linear));
    if (!w->ranks)
        return;
    w->linear = linear, w->input = x, w->input_stride = stride, w->output = y, w->output_width = weights->n_out;
    int64_t tiles = (w->ranks + SOME_RANKS - 1) / SOME_RANKS;
    fedtune_pool_run(w->threads, pieces * tiles, pieces > 1 ? tiles : 1, shrink, w);
    tiles = (w->output_width + SOME_COLUMNS - 1) / SOME_COLUMNS;
    fedtune_pool_run(w->threads, pieces * tiles, pieces > 1 ? tiles : 1, expand, w);
}

static void run_layer(struct work *w) {
    const struct fedtune_layer *l = w->layer;
    const int64_t n = w->d->hidden, rows = w->p->rows;
    if (w->index == w->p->first)
        for_rows(w, rows, begin);
    end_step(ROWS);
    product(w, QKV, l->norm ? w->x : w->p->hidden, n, w->qkv);
    end_step(QKV_STEP);
    for_rows(w, rows, prepare);
    end_step(ROPE);
    const int64_t together = attended_together(w);
    fedtune_pool_run(w->threads, w->d->kv_heads * ((rows + together - 1) / together), 1, attend, w);
    for_rows(w, rows, round_attended);
    end_step(ATTENTION);
    product(w, O, w->attended, w->d->heads * w->d->head_dim, w->y);
    end_step(O_STEP);
    for_rows(w, rows, finish_attention);
    end_step(ROWS);
    product(w, GATE_UP, l->mlp_norm ? w->x : w->p->hidden, n, w->wide);
    end_step(GATE_UP_STEP);
    for_rows(w, rows, activate);
    end_step(ACTIVATION);
    product(w, DOWN, w->wide, 2 * w->d->intermediate, w->y);
    end_step(DOWN_STEP);
    for_rows(w, rows, finish_mlp);
    end_step(ROWS);
}

static void cap_logits(void *argument, int64_t first, int64_t end) {
    const struct work *w = argument;
    for (int64_t i = first; i < end; i++)
        w->op->cap(w->p->logits + i * w->d->head.n_out, w->d->head.n_out, w->d->logit_cap);
}

static void make_logits(struct work *w) {
    const int64_t n = w->d->hidden, count = w->p->kept_count;
    for (int64_t i = 0; i < count; i++)
        w->op->norm(w->p->hidden + w->p->kept[i] * n, w->d->norm, w->x + i * n, n, w->d->eps);
    fedtune_product(&w->d->head, w->kernels, w->threads, count, w->x, n, w->p->logits, w->space);
    if (w->d->logit_cap != 0)
        fedtune_pool_run(w->threads, count, 1, cap_logits, w);
}

/* Cuts a piece off the memory at `at`, in whole cache lines. */
static void *cut(char *memory, int64_t *at, int64_t bytes) {
    char *piece = memory ? memory + *at : NULL;
    *at += (bytes + 63) / 64 * 64;
    return piece;
}

static int64_t most_space(const struct work *w) {
    int64_t most = w->p->logits ? fedtune_space_for(&w->d->head, w->p->rows) : 0;
    for (int64_t i = 0; i < w->d->layers * LINEARS; i++)
        most = larger(most, fedtune_space_for(linear_of(w->d->layer + i / LINEARS, i % LINEARS), w->p->rows));
    return most;
}

static int64_t most_ranks(const struct work *w) {
    int64_t most = 0;
    for (int64_t i = 0; i < w->p->span_count; i++)
        for (int64_t k = 0; w->p->spans[i].lora && k < w->d->layers * LINEARS; k++)
            most = larger(most, ranks_of(w->p->spans[i].lora, k / LINEARS, k % LINEARS));
    return most;
}

/* Divides the memory among the arrays of `work`. Returns the bytes that they take; a null `memory` only asks for these. */
static int64_t lay_out(struct work *w, char *memory) {
    const struct fedtune_decoder *d = w->d;
    const int64_t rows = w->p->rows, a_float = rows * (int64_t)sizeof(float);
    int64_t at = 0;
    w->positions = cut(memory, &at, rows * (int64_t)sizeof *w->positions);
    w->owners = cut(memory, &at, rows * (int64_t)sizeof *w->owners);
    w->starts = cut(memory, &at, w->p->span_count * (int64_t)sizeof *w->starts);
    w->x = cut(memory, &at, a_float * d->hidden);
    w->y = cut(memory, &at, a_float * d->hidden);
    w->qkv = cut(memory, &at, a_float * w->qkv_width);
    w->attended = cut(memory, &at, a_float * d->heads * d->head_dim);
    w->wide = cut(memory, &at, a_float * 2 * d->intermediate);
    w->space = cut(memory, &at, most_space(w));
    w->shrunk = cut(memory, &at, a_float * most_ranks(w));
    return at;
}

int fedtune_pass_run(const struct fedtune_decoder *decoder, const struct fedtune_pass *pass, const struct kernels *kernels, int threads) {
    if (threads < 1 || !fedtune_decoder_fits(decoder) || !fedtune_pass_fits(decoder, pass))
        return BAD_SIZE;
    struct work w = {.d = decoder, .p = pass, .kernels = kernels, .op = kernels->operations, .threads = threads,
                     .qkv_width = (decoder->heads + 2 * decoder->kv_heads) * decoder->head_dim};
    char *memory = aligned_alloc(64, (size_t)lay_out(&w, NULL));
    if (!memory)
        return NO_MEMORY;
    lay_out(&w, memory);
    for (int64_t i = 0, row = 0; i < pass->span_count; i++) {
        w.starts[i] = row;
        for (int64_t k = 0; k < pass->spans[i].rows; k++, row++) {
            const struct fedtune_span *s = pass->spans + i;
            int64_t chain = s->rows - s->fork_count;
            w.positions[row] = s->length + (k < chain ? k : s->forks[k - chain] + 1);
            w.owners[row] = i;
        }
    }
    end_step(REST);
    for (w.index = pass->first; w.index < pass->last; w.index++) {
        w.layer = decoder->layer + w.index;
        run_layer(&w);
    }
    if (pass->logits)
        make_logits(&w);
    end_step(HEAD);
    free(memory);
    return FINE;
}
