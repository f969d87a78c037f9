/* The product of float rows with packed weights: the check of all sizes, and the work on several threads. */
#include <stddef.h>

#include "kernels.h"

enum { FEW = 4, MOST_COLUMNS = 1 << 24 }; /* rows that one thread rounds alone; most columns of W */

/* Whether `bytes` are exactly a * b * c * d, without overflow. */
int fedtune_is_product(int64_t bytes, int64_t a, int64_t b, int64_t c, int64_t d) {
    int64_t product;
    return !__builtin_mul_overflow(a, b, &product) && !__builtin_mul_overflow(product, c, &product) &&
           !__builtin_mul_overflow(product, d, &product) && product == bytes;
}

int fedtune_weights_fit(const struct fedtune_weights *w) {
    static const int64_t code_bytes[KINDS] = {256, 256, 512, 1024, 0}, scale_bytes[KINDS] = {32, 64, 0, 0, 0}, base_floats[KINDS] = {2, 2, BLOCK, 0, 0};
    if (w->kind < 0 || w->kind >= KINDS || w->n_in < 1 || w->n_in > MOST_COLUMNS || w->n_out < 1 || w->n_out > INT64_MAX - BLOCK)
        return 0;
    int64_t groups = groups_of(w->n_in), blocks = (w->n_out + BLOCK - 1) / BLOCK;
    return w->codes && (w->kind == FP32 ? fedtune_is_product(w->codes_bytes, w->n_out, w->n_in, sizeof(float), 1)
                                        : fedtune_is_product(w->codes_bytes, blocks, groups, code_bytes[w->kind], 1)) &&
           fedtune_is_product(w->scales_bytes, blocks, groups, scale_bytes[w->kind], 1) && (w->scales || !w->scales_bytes) &&
           fedtune_is_product(w->base_bytes, blocks, base_floats[w->kind], sizeof(float), 1) && (w->base || !w->base_bytes) &&
           (w->bias ? fedtune_is_product(w->bias_bytes, w->n_out, sizeof(float), 1, 1) : !w->bias_bytes);
}

/* Bytes of a rounded activation, and whether groups of them have a struct columns. */
static int64_t bytes_of(int64_t kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }

static int has_columns(int64_t kind) { return kind != FP32 && kind != BF16; }

int64_t fedtune_space_for(const struct fedtune_weights *w, int64_t rows) {
    int64_t columns = has_columns(w->kind) ? (int64_t)sizeof(struct columns) : 0, bytes;
    int64_t a_row = groups_of(w->n_in) * (GROUP * bytes_of(w->kind) + columns);
    return __builtin_mul_overflow(rows, a_row, &bytes) || bytes > INT64_MAX - 64 ? -1 : bytes;
}

/* Where rounded rows lie in a product's space: codes, then columns. */
static uint8_t *codes_at(const struct fedtune_weights *w, int64_t row, void *space) {
    return (uint8_t *)space + row * groups_of(w->n_in) * GROUP * bytes_of(w->kind);
}

static struct columns *columns_at(const struct fedtune_weights *w, int64_t rows, int64_t row, void *space) {
    return has_columns(w->kind) ? (struct columns *)codes_at(w, rows, space) + row * groups_of(w->n_in) : NULL; /* codes end at a multiple of 32 */
}

void fedtune_round(const struct fedtune_weights *w, const struct kernels *kernels, int64_t rows, int64_t row, const float *x, void *space) {
    round_row *run = w->kind == FP32 ? kernels->copy : w->kind == BF16 ? kernels->to_bf16 : kernels->to_int8;
    run(x, w->n_in, codes_at(w, row, space), columns_at(w, rows, row, space));
}

struct job {
    const struct fedtune_weights *w;
    const struct kernels *kernels;
    const float *x;
    float *y;
    void *space;
    int64_t rows, x_stride;
    int64_t steps, count; /* items for each TILE rows, and all items */
    int64_t piece, threads; /* items that a thread takes at once; threads */
};

static void round_rows(void *argument, int64_t first, int64_t end) {
    const struct job *job = argument;
    for (int64_t i = first; i < end; i++)
        fedtune_round(job->w, job->kernels, job->rows, i, job->x + i * job->x_stride, job->space);
}

/* Items: TILE_BLOCKS blocks for each TILE rows. */
static void multiply_blocks(void *argument, int64_t first, int64_t end) {
    const struct job *job = argument;
    const struct fedtune_weights *w = job->w;
    float ends[TILE * TILE_BLOCKS * BLOCK]; /* outputs of blocks whose last rows are padding */
    for (int64_t item = first; item < end; item++) {
        const int64_t block = item % job->steps * TILE_BLOCKS, row = item / job->steps * TILE, rows = smaller(TILE, job->rows - row);
        const int64_t n = smaller(TILE_BLOCKS * BLOCK, w->n_out - block * BLOCK), whole = n % BLOCK == 0;
        const int64_t after = item + 1 < end ? item + 1 : first + job->threads * job->piece; /* the item that this thread most likely takes next */
        float *y = job->y + row * w->n_out + block * BLOCK;
        job->kernels->tiles[w->kind](w, block, (int)((n + BLOCK - 1) / BLOCK), after < job->count ? after % job->steps * TILE_BLOCKS : 0,
                                     codes_at(w, row, job->space), columns_at(w, job->rows, row, job->space), (int)rows, whole ? y : ends,
                                     whole ? w->n_out : TILE_BLOCKS * BLOCK);
        for (int64_t i = 0; i < rows && !whole; i++)
            memcpy(y + i * w->n_out, ends + i * TILE_BLOCKS * BLOCK, (size_t)n * sizeof *y);
        for (int64_t i = 0; i < rows && w->bias; i++)
            for (int64_t r = 0; r < n; r++)
                y[i * w->n_out + r] += w->bias[block * BLOCK + r];
    }
}

void fedtune_product_of_rounded(const struct fedtune_weights *w, const struct kernels *kernels, int threads, int64_t rows, float *y, void *space) {
    const int64_t steps = (w->n_out + TILE_BLOCKS * BLOCK - 1) / (TILE_BLOCKS * BLOCK), count = steps * ((rows + TILE - 1) / TILE);
    struct job job = {.w = w, .kernels = kernels, .y = y, .space = space, .rows = rows, .steps = steps, .count = count, .threads = threads,
                      .piece = rows < TILE / 2 ? larger(count / (8 * (int64_t)threads), 1) : 1}; /* with many rows one item takes long enough */
    fedtune_pool_run(threads, count, job.piece, multiply_blocks, &job);
}

void fedtune_product(const struct fedtune_weights *w, const struct kernels *kernels, int threads, int64_t rows, const float *x, int64_t x_stride,
                     float *y, void *space) {
    struct job job = {.w = w, .kernels = kernels, .x = x, .space = space, .rows = rows, .x_stride = x_stride};
    fedtune_pool_run(rows > FEW ? threads : 1, rows, rows > 8 * FEW ? 8 : FEW, round_rows, &job);
    fedtune_product_of_rounded(w, kernels, threads, rows, y, space);
}
