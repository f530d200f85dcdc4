/* Faults at the n-th change of a folder: the process is killed, or the disk is full from then on.
 *
 * Loaded by LD_PRELOAD. `arm` says what to do, and only what lies below the folder counts; `count` says how many calls
 * there were. Calls that only read are left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { NOTHING, KILL, FULL };

static char folder[4096];
static long calls, at;
static int fault;

void arm(const char *where, long number, int what) {
    snprintf(folder, sizeof folder, "%s", where);
    calls = 0, at = number, fault = what;
}

long count(void) { return calls; }

/* Whether a path, relative to the folder `dir` if it is relative, lies below the folder. */
static int ours(int dir, const char *path) {
    char whole[8192], link[64];
    if (!folder[0] || !path) return 0;
    if (path[0] != '/') {
        ssize_t length;
        if (dir == AT_FDCWD) return 0; /* the trials name everything by its absolute path */
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        length = readlink(link, whole, sizeof whole - 1);
        if (length < 0) return 0;
        whole[length] = 0;
    } else {
        snprintf(whole, sizeof whole, "%s", path);
    }
    return strncmp(whole, folder, strlen(folder)) == 0;
}

static int ours_open(int descriptor) { return ours(descriptor, "x"); }

/* Whether this call fails; `grows` if it needs room on the disk. */
static int fails(int is_ours, int grows) {
    if (!is_ours) return 0;
    calls++;
    if (fault == KILL && calls == at) kill(getpid(), SIGKILL);
    if (fault == FULL && calls >= at && grows) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name);

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; \
        mode_t mode; \
        REAL(int, #name, const char *, int, ...) \
        va_start(more, flags), mode = va_arg(more, mode_t), va_end(more); \
        if ((flags & (O_CREAT | O_TRUNC)) && fails(ours(AT_FDCWD, path), 1)) return -1; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        va_list more; \
        mode_t mode; \
        REAL(int, #name, int, const char *, int, ...) \
        va_start(more, flags), mode = va_arg(more, mode_t), va_end(more); \
        if ((flags & (O_CREAT | O_TRUNC)) && fails(ours(dir, path), 1)) return -1; \
        return real(dir, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int descriptor, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t)
    if (fails(ours_open(descriptor), 1)) {
        if (size > 1 && calls == at) return real(descriptor, data, size / 2); /* what still fits is written */
        return -1;
    }
    return real(descriptor, data, size);
}

int fsync(int descriptor) {
    REAL(int, "fsync", int)
    return fails(ours_open(descriptor), 1) ? -1 : real(descriptor);
}

int ftruncate64(int descriptor, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t)
    return fails(ours_open(descriptor), 0) ? -1 : real(descriptor, size);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t)
    return fails(ours(AT_FDCWD, path), 1) ? -1 : real(path, mode);
}

int rename(const char *path, const char *target) {
    REAL(int, "rename", const char *, const char *)
    return fails(ours(AT_FDCWD, path), 1) ? -1 : real(path, target);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *)
    return fails(ours(AT_FDCWD, path), 0) ? -1 : real(path);
}

int unlinkat(int dir, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int)
    return fails(ours(dir, path), 0) ? -1 : real(dir, path, flags);
}

int rmdir(const char *path) {
    REAL(int, "rmdir", const char *)
    return fails(ours(AT_FDCWD, path), 0) ? -1 : real(path);
}
