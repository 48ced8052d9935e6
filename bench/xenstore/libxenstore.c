/*
 * A client on libxenstore: `libxenstore LOAD COUNT` prints how many microseconds an operation of LOAD took.
 * The same loads as ours.py and pyxs_client.py have, by the same names.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xenstore.h>

static const char path[] = "/bench/node", value[] = "value";

static void check(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static void read_node(struct xs_handle *xs, xs_transaction_t tx)
{
    unsigned int length;
    void *found = xs_read(xs, tx, path, &length);

    check(found != NULL, "xs_read");
    free(found);
}

static void write_node(struct xs_handle *xs, xs_transaction_t tx)
{
    check(xs_write(xs, tx, path, value, strlen(value)), "xs_write");
}

static void load_read(struct xs_handle *xs)
{
    read_node(xs, XBT_NULL);
}

static void load_write(struct xs_handle *xs)
{
    write_node(xs, XBT_NULL);
}

static void load_transaction(struct xs_handle *xs)
{
    xs_transaction_t tx = xs_transaction_start(xs);

    check(tx != XBT_NULL, "xs_transaction_start");
    read_node(xs, tx);
    write_node(xs, tx);
    check(xs_transaction_end(xs, tx, 0), "xs_transaction_end");
}

static const struct {
    const char *name;
    void (*once)(struct xs_handle *xs);
} loads[] = {
    { "read", load_read },
    { "write", load_write },
    { "transaction", load_transaction },
};

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

int main(int argc, char **argv)
{
    struct xs_handle *xs = xs_open(0);

    check(xs != NULL, "xs_open");
    check(argc == 3, "usage: libxenstore LOAD COUNT");
    write_node(xs, XBT_NULL);
    for (size_t i = 0; i < sizeof(loads) / sizeof(loads[0]); i++) {
        long count = atol(argv[2]);
        double start = now();

        if (strcmp(loads[i].name, argv[1]))
            continue;
        for (long left = count; left; left--)
            loads[i].once(xs);
        printf("%f\n", (now() - start) / count);
        return 0;
    }
    fprintf(stderr, "no load %s\n", argv[1]);
    return 1;
}
