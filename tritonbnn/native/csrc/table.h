/* Products of real numbers with signs, by table.

   A product with a sign is a number or its negative. Six numbers have 64 signed sums. They are made
   once, and each later use of the six numbers is one look-up and one addition, where it would have
   been six multiplications and additions. Numbers and sums are vectors: 16 lanes share the signs.

   Thirty signs, in five groups of six, make a word: bit 6 g + i is the sign of number i in group g,
   1 for +1 and 0 for -1. The five tables of a word take 20 KiB, so that they stay in the first
   cache. */
#ifndef TRITONBNN_TABLE_H
#define TRITONBNN_TABLE_H

#include "vector.h"

#define GROUP 6
#define GROUPS 5
#define WORD (GROUP * GROUPS)
#define ENTRIES (1 << GROUP)

typedef struct {
    vec sums[GROUPS][ENTRIES];
} tables;

INLINE int64_t table_words(int64_t signs) { return (signs + WORD - 1) / WORD; }

/* Numbers in the given word of a row of so many. */
INLINE int64_t word_size(int64_t numbers, int64_t word) {
    int64_t rest = numbers - word * WORD;
    return rest < WORD ? rest : WORD;
}

INLINE int64_t groups_of(int64_t numbers) { return (numbers + GROUP - 1) / GROUP; }

/* All signed sums of three numbers, by their three signs: one part of each. */
INLINE void sums_of_three(const vec *numbers, int r, part *sums) {
    part first = ((const part *)numbers)[r], second = ((const part *)(numbers + 1))[r];
    part plus = first + second, minus = first - second, last = ((const part *)(numbers + 2))[r];
    part pairs[4] = {-plus, minus, -minus, plus};
    EACH(e, 4) {
        sums[e] = pairs[e] - last;
        sums[e + 4] = pairs[e] + last;
    }
}

/* Make the tables of at most 30 numbers. Room for 30 must be there: the rest is set to 0. */
INLINE void make_tables(tables *t, vec *numbers, int64_t count) {
    int64_t groups = groups_of(count);
    for (int64_t i = count; i < groups * GROUP; i++) numbers[i] = splat(0);
    for (int64_t g = 0; g < groups; g++)
        EACH(r, PARTS) {
            part low[8], high[8];
            sums_of_three(numbers + g * GROUP, r, low);
            sums_of_three(numbers + g * GROUP + 3, r, high);
            EACH(h, 8) EACH(l, 8) ((part *)(t->sums[g] + 8 * h + l))[r] = low[l] + high[h];
        }
}

/* Add the sum of one word of signs. The compiler unrolls: groups is a constant. */
INLINE void add_word(const tables *t, uint32_t signs, int groups, vec *sum) {
    uint64_t scaled = (uint64_t)signs * sizeof(vec); /* an offset in bytes for group 0 */
    const uint64_t field = (ENTRIES - 1) * sizeof(vec);
    const part *entries[GROUPS];
    EACH(g, groups)
        entries[g] = (const part *)((const char *)t->sums[g] + (scaled >> GROUP * g & field));
    EACH(r, PARTS) {
        part total = entries[0][r];
        EACH(g, groups - 1) total += entries[g + 1][r];
        ((part *)sum)[r] += total;
    }
}

INLINE void add_words(const tables *t, const uint32_t *signs, int64_t step, vec *sums, int64_t n,
                      int groups) {
    for (int64_t i = 0; i < n; i++) add_word(t, signs[i * step], groups, sums + i);
}

/* sums[i] += the sum that the word signs[i * step] names, for the first so many groups. */
static inline void add_products(const tables *t, int64_t groups, const uint32_t *signs,
                                int64_t step, vec *sums, int64_t n) {
    switch (groups) {
    case 1: add_words(t, signs, step, sums, n, 1); break;
    case 2: add_words(t, signs, step, sums, n, 2); break;
    case 3: add_words(t, signs, step, sums, n, 3); break;
    case 4: add_words(t, signs, step, sums, n, 4); break;
    default: add_words(t, signs, step, sums, n, 5); break;
    }
}

#endif
