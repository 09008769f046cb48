/* How fast signs can be multiplied here: all that the loop reads is in the first cache. */
#include "count.h"
#include "engine.h"

enum { ROWS = 3, WORDS = 24, COUNT = ROWS * WORDS }; /* of a 3 x 3 kernel over 256 channels */

/* The products of so many tiles. sum: how many signs differed in all of them, so that no compiler
   leaves the work out. */
EXPORT int64_t tritonbnn_engine_peak(int64_t tiles, int64_t *sum) {
    uint32_t weight[COUNT * LANES], input[PIXELS + COUNT];
    const uint32_t *inputs[PIXELS];
    ivec counts[PIXELS];
    for (uint32_t i = 0; i < COUNT * LANES; i++) weight[i] = 2654435761u * (i + 1);
    for (uint32_t i = 0; i < PIXELS + COUNT; i++) input[i] = 2246822519u * (i + 1);
    for (int p = 0; p < PIXELS; p++) inputs[p] = input + p;
    *sum = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
        count_different(weight, inputs, ROWS, WORDS, WORDS, PIXELS, counts);
        *sum += counts[tile % PIXELS][tile % LANES];
        __asm__ volatile("" ::: "memory"); /* each time anew */
    }
    return tiles * PIXELS * LANES * COUNT * 32;
}
