/* How fast signs can be multiplied here: all that the loop reads is in the first cache. */
#include "count.h"
#include "engine.h"

enum { ROWS = 3, WORDS = 24, COUNT = ROWS * WORDS }; /* of a 3 x 3 kernel over 256 channels */

/* The products of so many equal tiles. sum: how many signs differed in one. */
EXPORT int64_t tritonbnn_engine_peak(int64_t tiles, int64_t *sum) {
    static uint32_t weight[COUNT * LANES] __attribute__((aligned(64))), input[PIXELS + COUNT];
    const uint32_t *inputs[PIXELS];
    ivec counts[PIXELS] = {{0}};
    for (uint32_t i = 0; i < COUNT * LANES; i++) weight[i] = 2654435761u * (i + 1);
    for (uint32_t i = 0; i < PIXELS + COUNT; i++) input[i] = 2246822519u * (i + 1);
    for (int p = 0; p < PIXELS; p++) inputs[p] = input + p;
    int64_t rows = ROWS, words = WORDS;
    __asm__ volatile("" : "+r"(rows), "+r"(words)); /* no constants, as in the engine */
    for (int64_t tile = 0; tile < tiles; tile++) {
        count_different(weight, inputs, rows, words, words, PIXELS, counts);
        __asm__ volatile("" : : "r"(counts) : "memory"); /* each time anew, and all of it */
    }
    *sum = 0;
    for (int p = 0; p < PIXELS; p++)
        for (int i = 0; i < LANES; i++) *sum += counts[p][i];
    return tiles * PIXELS * LANES * COUNT * 32;
}
