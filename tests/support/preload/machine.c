/*
 * A machine without a hypervisor, for Debian's xenstored and oxenstored: preloaded into them, this library
 * answers what they ask of libxenctrl, libxenevtchn and libxengnttab. The machine is a folder, $XENBUS_MACHINE:
 *
 *   N/state   there while domain N is; its letters: d dying, c crashed, s shut down
 *   N/page    its ring page, 4096 bytes, whatever frame or grant is asked for
 *   N/kick    a FIFO: one byte for each notification that the daemon sends it
 *   evtchn    a FIFO: numbers of the daemon's ports that are pending, 32 bits each
 *   echo      a FIFO, see below
 *   run/      in the place of /var/run/xenstored, whose name oxenstored has built in
 *
 * The daemon's ports: 1 is VIRQ_DOM_EXC, PORT_BASE + N the channel to domain N; 2 is answered here with a byte into
 * the FIFO `echo`: whatever was pending before it has been dealt with. $XENBUS_MACHINE_HURRY is how many
 * times faster the monotonic clock goes: it takes the wait out of xenstored's limit of a guest's writes a second.
 *
 * No header of Xen is needed: layouts are those of Xen 4.17's xenctrl.h and domctl.h.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define PORT_VIRQ 1
#define PORT_ECHO 2
#define PORT_BASE 16
#define DOMAINS 0x7ff0
#define RUN "/var/run/xenstored"

/* The function that ours stands in front of, looked up once. */
#define REAL(name)                                    \
    ({                                                \
        static __typeof__(&name) real;                \
        if (!real)                                    \
            *(void **)&real = dlsym(RTLD_NEXT, #name); \
        real;                                         \
    })

static const char *machine; /* the folder */
static long hurry;
static int kicks[DOMAINS]; /* descriptor + 1 of N/kick while the channel is bound */

__attribute__((constructor)) static void begin(void)
{
    const char *times = getenv("XENBUS_MACHINE_HURRY");

    machine = getenv("XENBUS_MACHINE");
    hurry = times ? atol(times) : 0;
    if (!machine) {
        fputs("XENBUS_MACHINE is not set\n", stderr);
        abort();
    }
    /* Whoever started the daemon is gone, however it went: so is the daemon. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
}

static const char *place(char *buffer, const char *format, ...)
{
    char tail[256];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(tail, sizeof(tail), format, arguments);
    va_end(arguments);
    snprintf(buffer, PATH_MAX, "%s/%s", machine, tail);
    return buffer;
}

static int open_in_machine(int flags, const char *format, unsigned int domid)
{
    char path[PATH_MAX];

    return REAL(open)(place(path, format, domid), flags | O_CLOEXEC);
}

/* ---- files: what the daemons open by a name of their own ---- */

static const char *moved(const char *path, char *buffer)
{
    size_t run = strlen(RUN);

    if (!strcmp(path, "/proc/xen/xsd_kva") || !strcmp(path, "/dev/xen/xsd_kva"))
        return place(buffer, "0/page");
    if (!strcmp(path, "/proc/xen/xsd_port") || !strcmp(path, "/dev/xen/xsd_port"))
        return place(buffer, "0/port");
    if (!strncmp(path, RUN, run) && (path[run] == '/' || !path[run]))
        return place(buffer, "run%s", path + run);
    return path;
}

int open(const char *path, int flags, ...)
{
    char buffer[PATH_MAX];
    va_list arguments;
    mode_t mode = 0;

    if (flags & (O_CREAT | __O_TMPFILE)) {
        va_start(arguments, flags);
        mode = va_arg(arguments, mode_t);
        va_end(arguments);
    }
    return REAL(open)(moved(path, buffer), flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list arguments;
    mode_t mode = 0;

    if (flags & (O_CREAT | __O_TMPFILE)) {
        va_start(arguments, flags);
        mode = va_arg(arguments, mode_t);
        va_end(arguments);
    }
    return open(path, flags, mode);
}

int unlink(const char *path)
{
    char buffer[PATH_MAX];

    return REAL(unlink)(moved(path, buffer));
}

int chmod(const char *path, mode_t mode)
{
    char buffer[PATH_MAX];

    return REAL(chmod)(moved(path, buffer), mode);
}

int mkdir(const char *path, mode_t mode)
{
    char buffer[PATH_MAX];

    return REAL(mkdir)(moved(path, buffer), mode);
}

int access(const char *path, int mode)
{
    char buffer[PATH_MAX];

    return REAL(access)(moved(path, buffer), mode);
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
    struct sockaddr_un local;
    char buffer[PATH_MAX];

    if (address->sa_family != AF_UNIX || length > sizeof(local))
        return REAL(bind)(fd, address, length);
    memset(&local, 0, sizeof(local));
    memcpy(&local, address, length);
    local.sun_path[sizeof(local.sun_path) - 1] = 0;
    if (local.sun_path[0]) {
        const char *path = moved(local.sun_path, buffer);

        if (strlen(path) >= sizeof(local.sun_path)) {
            errno = ENAMETOOLONG;
            return -1;
        }
        memmove(local.sun_path, path, strlen(path) + 1);
    }
    return REAL(bind)(fd, (struct sockaddr *)&local, sizeof(local));
}

/* ---- limits and time ---- */

int setrlimit(__rlimit_resource_t resource, const struct rlimit *limit)
{
    (void)resource, (void)limit;
    return 0;
}

int clock_gettime(clockid_t id, struct timespec *now)
{
    int rc = REAL(clock_gettime)(id, now);

    if (!rc && hurry && id == CLOCK_MONOTONIC) {
        __int128 nanoseconds = ((__int128)now->tv_sec * 1000000000 + now->tv_nsec) * hurry;

        now->tv_sec = nanoseconds / 1000000000;
        now->tv_nsec = nanoseconds % 1000000000;
    }
    return rc;
}

/* ---- libxenctrl ---- */

struct xc_error {
    int code;
    char message[1024];
};

struct xc_dominfo { /* 112 bytes, of which the daemons look at these */
    uint32_t domid, ssidref;
    unsigned int dying : 1, crashed : 1, shutdown : 1, others : 29;
    unsigned int shutdown_reason;
    uint64_t rest[12];
};

struct xc_domaininfo { /* likewise 112 bytes */
    uint16_t domid, pad;
    uint32_t flags;
    uint64_t rest[13];
};

_Static_assert(sizeof(struct xc_dominfo) == 112, "xc_dominfo_t of 4.17");
_Static_assert(sizeof(struct xc_domaininfo) == 112, "xc_domaininfo_t of 4.17");

#define DOMINF_DYING (1u << 0)
#define DOMINF_SHUTDOWN (1u << 2)
#define DOMINF_SHUTDOWNSHIFT 16
#define SHUTDOWN_CRASH 3

/* Whether there is such a domain; its letters, at most 7. */
static int domain_state(unsigned int domid, char letters[8])
{
    int fd = domid < DOMAINS ? open_in_machine(O_RDONLY, "%u/state", domid) : -1;

    if (fd < 0) {
        errno = ESRCH;
        return 0;
    }
    memset(letters, 0, 8);
    if (read(fd, letters, 7) < 0)
        letters[0] = 0;
    close(fd);
    return 1;
}

void *xc_interface_open(void *logger, void *dombuild_logger, unsigned int flags)
{
    static int handle;

    (void)logger, (void)dombuild_logger, (void)flags;
    return &handle;
}

int xc_interface_close(void *xch)
{
    (void)xch;
    return 0;
}

const struct xc_error *xc_get_last_error(void *xch)
{
    static const struct xc_error none;

    (void)xch;
    return &none;
}

int xc_domain_getinfo(void *xch, uint32_t first, unsigned int max, struct xc_dominfo *info)
{
    char letters[8];

    (void)xch;
    if (!max || !domain_state(first, letters))
        return -1;
    memset(info, 0, sizeof(*info));
    info->domid = first;
    info->dying = !!strchr(letters, 'd');
    info->crashed = !!strchr(letters, 'c');
    info->shutdown = !info->crashed && strchr(letters, 's');
    if (info->crashed)
        info->shutdown_reason = SHUTDOWN_CRASH;
    return 1;
}

int xc_domain_getinfolist(void *xch, uint32_t first, unsigned int max, struct xc_domaininfo *info)
{
    char letters[8];

    (void)xch;
    if (!max || !domain_state(first, letters))
        return -1;
    memset(info, 0, sizeof(*info));
    info->domid = first;
    if (strchr(letters, 'd'))
        info->flags |= DOMINF_DYING;
    if (strchr(letters, 's'))
        info->flags |= DOMINF_SHUTDOWN;
    if (strchr(letters, 'c'))
        info->flags |= DOMINF_SHUTDOWN | SHUTDOWN_CRASH << DOMINF_SHUTDOWNSHIFT;
    return 1;
}

static void *map_page(unsigned int domid)
{
    int fd = domid < DOMAINS ? open_in_machine(O_RDWR, "%u/page", domid) : -1;
    void *page;

    if (fd < 0) {
        errno = EINVAL; /* as gntdev's mmap for a grant that is none */
        return NULL;
    }
    page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return page == MAP_FAILED ? NULL : page;
}

void *xc_map_foreign_range(void *xch, uint32_t domid, int size, int prot, unsigned long mfn)
{
    (void)xch, (void)size, (void)prot, (void)mfn;
    return map_page(domid);
}

/* ---- libxengnttab ---- */

void *xengnttab_open(void *logger, unsigned int flags)
{
    return xc_interface_open(logger, NULL, flags);
}

int xengnttab_close(void *xgt)
{
    return xc_interface_close(xgt);
}

int xengnttab_set_max_grants(void *xgt, uint32_t count)
{
    (void)xgt, (void)count;
    return 0;
}

void *xengnttab_map_grant_ref(void *xgt, uint32_t domid, uint32_t ref, int prot)
{
    (void)xgt, (void)ref, (void)prot;
    return map_page(domid);
}

int xengnttab_unmap(void *xgt, void *start, uint32_t count)
{
    (void)xgt;
    return munmap(start, count * PAGE);
}

/* ---- libxenevtchn ---- */

struct evtchn {
    int fd;
};

void *xenevtchn_fdopen(void *logger, int fd, unsigned int flags)
{
    struct evtchn *xce = malloc(sizeof(*xce));

    (void)logger, (void)flags;
    if (xce)
        xce->fd = fd;
    return xce;
}

void *xenevtchn_open(void *logger, unsigned int flags)
{
    char path[PATH_MAX];
    int fd = REAL(open)(place(path, "evtchn"), O_RDWR);

    return fd < 0 ? NULL : xenevtchn_fdopen(logger, fd, flags);
}

int xenevtchn_close(struct evtchn *xce)
{
    close(xce->fd);
    free(xce);
    return 0;
}

int xenevtchn_fd(struct evtchn *xce)
{
    return xce->fd;
}

int xenevtchn_bind_virq(struct evtchn *xce, unsigned int virq)
{
    (void)xce, (void)virq;
    return PORT_VIRQ;
}

int xenevtchn_bind_interdomain(struct evtchn *xce, uint32_t domid, uint32_t remote_port)
{
    int fd = domid < DOMAINS ? open_in_machine(O_RDWR | O_NONBLOCK, "%u/kick", domid) : -1;
    uint32_t port = PORT_BASE + domid;

    (void)remote_port;
    if (fd < 0) {
        errno = EINVAL;
        return -1;
    }
    if (kicks[domid])
        close(kicks[domid] - 1);
    kicks[domid] = fd + 1;
    /* A fresh binding fires once. */
    if (write(xce->fd, &port, sizeof(port)) != sizeof(port))
        return -1;
    return port;
}

int xenevtchn_unbind(struct evtchn *xce, uint32_t port)
{
    uint32_t domid = port - PORT_BASE;

    (void)xce;
    if (domid < DOMAINS && kicks[domid]) {
        close(kicks[domid] - 1);
        kicks[domid] = 0;
    }
    return 0;
}

int xenevtchn_notify(struct evtchn *xce, uint32_t port)
{
    uint32_t domid = port - PORT_BASE;

    (void)xce;
    if (domid >= DOMAINS || !kicks[domid]) {
        errno = EINVAL;
        return -1;
    }
    /* Full: whoever reads there has been kicked often enough. */
    if (write(kicks[domid] - 1, "", 1) != 1 && errno != EAGAIN)
        return -1;
    return 0;
}

int xenevtchn_pending(struct evtchn *xce)
{
    static int echo = -1;
    uint32_t port;

    if (read(xce->fd, &port, sizeof(port)) != sizeof(port))
        return -1;
    if (port == PORT_ECHO) {
        if (echo < 0)
            echo = open_in_machine(O_RDWR | O_NONBLOCK, "echo", 0);
        if (write(echo, "", 1) != 1)
            return -1;
        return PORT_BASE;
    }
    /* Of a channel that was closed meanwhile: an event that means nothing to anybody. */
    if (port != PORT_VIRQ && !(port - PORT_BASE < DOMAINS && kicks[port - PORT_BASE]))
        return PORT_BASE;
    return port;
}

int xenevtchn_unmask(struct evtchn *xce, uint32_t port)
{
    (void)xce, (void)port;
    return 0;
}
