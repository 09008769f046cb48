/* How fast the loop over tables can be: all that it touches is in each thread's first cache. */
#include "table.h"

#define SUMS 64

/* Each thread adds SUMS vectors of sums so many times. products: how many that are, of all threads.
   result: one number, which depends on all of them, so that no compiler leaves them out. */
EXPORT void tritonbnn_table_peak(int64_t times, int64_t *products, float *result, int64_t threads) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        tables t;
        vec numbers[WORD], sums[SUMS] = {{0}};
        uint32_t signs[SUMS];
        for (int i = 0; i < WORD; i++) numbers[i] = splat(1.0f / (float)(i + 1));
        for (int i = 0; i < SUMS; i++) signs[i] = 2654435761u * (uint32_t)(i + 1);
        make_tables(&t, numbers, WORD);
        for (int64_t round = 0; round < times; round++) {
            add_products(&t, GROUPS, signs, 1, sums, SUMS);
            __asm__ volatile("" ::: "memory"); /* each time anew */
        }
        for (int i = 0; i < SUMS; i++) total += sums[i][0];
    }
    *products = threads * times * SUMS * LANES * WORD;
    *result = total;
}
