#include "clock.h"

#include <time.h>

int tritonbnn_clock_is_on;

/* Units may run in several threads of Python at once, so it is added to atomically. */
typedef struct {
    int64_t calls, nanoseconds;
    Work work;
} Record;

static Record records[CLOCK_PASSES];

int64_t tritonbnn_clock_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec + 1;
}

static void add(int64_t *total, int64_t value) {
    __atomic_fetch_add(total, value, __ATOMIC_RELAXED);
}

void tritonbnn_clock_add(Clocked pass, int64_t since, Work work) {
    Record *record = records + pass;
    add(&record->nanoseconds, tritonbnn_clock_now() - since);
    add(&record->calls, 1);
    add(&record->work.bytes, work.bytes);
    add(&record->work.table_products, work.table_products);
    add(&record->work.bit_products, work.bit_products);
}

/* Start from nothing (1), or stop (0). */
EXPORT void tritonbnn_clock_run(int64_t on, int64_t threads) {
    (void)threads;
    if (on) memset(records, 0, sizeof records);
    tritonbnn_clock_is_on = on != 0;
}

/* into: (passes, 5), of calls, nanoseconds, bytes, products by table and by counting bits. */
EXPORT void tritonbnn_clock_read(int64_t *into, int64_t threads) {
    (void)threads;
    memcpy(into, records, sizeof records);
}
