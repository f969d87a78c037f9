/* Products of a file, for emulated CPUs: `driver` prints the numbers of the CPU's sets, `driver SET FILE OUT` writes what it computes, and
 * `driver SET FILE OUT unasked` does not ask the CPU whether it has the set. Memory ends where each buffer does, so that no access beyond it is unseen.
 *
 * A case of the file: int64 kind, n_in, n_out, bytes of codes, scales, base and bias, rows, threads; then these buffers, and x.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "kernels.h"

int fedtune_multiply(const struct fedtune_weights *w, int set, int threads, int64_t rows, const float *x, int64_t x_bytes, float *y,
                     int64_t y_bytes);
int fedtune_supports(int set);

enum { PAGE = 65536 };

static const struct kernels *const unasked[SETS] = {
#ifdef HAS_NEON
    [DOTPROD] = &fedtune_dotprod, [I8MM] = &fedtune_i8mm,
#endif
#if defined(__x86_64__)
    [AVX2] = &fedtune_avx2, [AVX512] = &fedtune_avx512,
#endif
#ifdef HAS_AVXVNNI
    [AVXVNNI] = &fedtune_avxvnni,
#endif
};

static size_t mapped(int64_t bytes) { return ((size_t)bytes + 2 * PAGE - 1) / PAGE * PAGE; }

static void *new(int64_t bytes) {
    char *p = mmap(NULL, mapped(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + mapped(bytes) - PAGE, PAGE, PROT_NONE))
        exit(4);
    return p + mapped(bytes) - PAGE - bytes;
}

static void delete(void *p, int64_t bytes) { munmap((char *)p + bytes + PAGE - mapped(bytes), mapped(bytes)); }

static void *next(FILE *from, int64_t bytes) {
    void *p = new(bytes);
    if (fread(p, 1, (size_t)bytes, from) != (size_t)bytes)
        exit(5);
    return p;
}

int main(int count, char **arguments) {
    for (int set = 0; count == 1 && set < SETS; set++)
        if (fedtune_supports(set))
            printf("%d ", set);
    if (count < 4)
        return 0;
    const int set = atoi(arguments[1]);
    FILE *from = fopen(arguments[2], "rb"), *to = fopen(arguments[3], "wb");
    for (int64_t head[9]; from && to && fread(head, sizeof head, 1, from) == 1;) {
        const int64_t rows = head[7], x_bytes = rows * head[1] * 4, y_bytes = rows * head[2] * 4;
        struct fedtune_weights w = {head[0], head[1], head[2], 0, head[3], 0, head[4], 0, head[5], 0, head[6]};
        w.codes = next(from, head[3]), w.scales = next(from, head[4]), w.base = next(from, head[5]), w.bias = next(from, head[6]);
        float *x = next(from, x_bytes), *y = new(y_bytes);
        if (count == 4) {
            int failed = fedtune_multiply(&w, set, (int)head[8], rows, x, x_bytes, y, y_bytes);
            if (failed)
                return 10 + failed;
        } else {
            void *space = new((fedtune_space_for(&w, rows) + 63) / 64 * 64);
            fedtune_product(&w, unasked[set], (int)head[8], rows, x, w.n_in, y, space);
        }
        fwrite(y, 1, (size_t)y_bytes, to);
        delete((void *)w.codes, head[3]), delete((void *)w.scales, head[4]), delete((void *)w.base, head[5]), delete((void *)w.bias, head[6]);
        delete(x, x_bytes), delete(y, y_bytes);
    }
    return from && to && !fclose(to) ? 0 : 6;
}
