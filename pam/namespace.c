/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Mount namespaces: where the caller is, into the user's, and back.
 *
 * A process serves one user. It is remembered which namespace the process came from and for whom it was moved,
 * for all PAM handles of the process: smbd opens and closes each session with a handle of its own. While
 * sessions of several users are open, the process is where it came from.
 *
 * A refused session is over when its handle ends with an error. Until then, or if the handle ends without one,
 * it may be open: sessions of other users are refused, too.
 *
 * Not here: whose namespace it is (polytmpd.c), and whether the session moves at all (pam_polytmp.c).
 *
 * Hard facts:
 *  - setns(2): "A process can't join a new mount namespace if it is sharing filesystem-related attributes"
 *    (CLONE_FS). Threads share them (gdm-session-worker has threads), and so does a vfork() parent: EINVAL.
 *    So unshare(CLONE_FS) comes first. It needs no privilege and moves nothing.
 *  - A mount namespace belongs to a thread, not to a process (namespaces(7)): setns() moves the calling thread
 *    and what it forks. /proc/self is the thread group leader, /proc/thread-self the caller (proc(5)).
 *  - setns(CLONE_NEWNS) sets root and working directory to the namespace's root (mntns_install() in the kernel;
 *    no man page says so). If it fails it has changed neither, and after it nothing can fail: no rollback.
 *  - The working directory is looked up again, as root, among names that users made: openat2(2) without
 *    symlinks. Otherwise a link at /tmp/x could take a session past a directory that its user may not enter.
 *    The path from getcwd(2) has none. For a directory outside the root it is "(unreachable)/...".
 *  - libpam unloads modules in pam_end(3). The record below survives because of -z nodelete (Makefile). A forked
 *    child inherits it together with the namespace, so it is true there too. exec() loses it: a new program in
 *    a user's namespace has come from there.
 *  - /proc may be missing in a chroot, but also in a sandbox (InaccessiblePaths=/proc), and /proc/1 is if /proc
 *    is mounted with hidepid= and the process lacks CAP_SYS_PTRACE (proc(5)). A chroot into a directory is told
 *    by statx(2), Linux 5.8: its / is not the root of a mount. A chroot into a mount needs /proc.
 *  - A program may close descriptors that it does not know, and reuse the numbers. So a descriptor is kept only
 *    if the process did not come from PID 1's namespace, which can be opened again, and it is compared before use.
 *  - The kernel reuses the inode number of a namespace that is gone. PID 1's never goes, the descriptor keeps
 *    the one it belongs to, and the process itself keeps the one that it is in.
 */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <linux/nsfs.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <syslog.h>
#include <unistd.h>

#include <security/pam_ext.h>

#include "pam_polytmp.h"

#define MNT_NS "/proc/thread-self/ns/mnt"
#define MNT_NS_OF_PID_1 "/proc/1/ns/mnt"

/* Sessions and moves of this process. Threads may open sessions at the same time: hold the lock. */
static struct record {
        unsigned sessions; /* open now; refused ones count, because an optional module lets them in */
        unsigned refused;  /* of these */
        uid_t uid;         /* of the first of them */
        bool several;      /* there were sessions of other users meanwhile */
        bool moved;        /* for uid, from origin to target, and perhaps back */
        struct stat origin, target;
        int origin_fd; /* -1 if origin is PID 1's namespace */
} record = { .origin_fd = -1 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void acquire_lock(void) {
        pthread_mutex_lock(&lock);
}

static void release_lock(void) {
        pthread_mutex_unlock(&lock);
}

static void unlockp(UNUSED int *unused) {
        release_lock();
}

#define LOCKED() CLEANUP(unlockp) UNUSED int locked = (acquire_lock(), 0)

/* A thread that holds the lock does not exist in the child of another thread. */
__attribute__((constructor)) static void survive_fork(void) {
        pthread_atfork(acquire_lock, release_lock, release_lock);
}

static bool same_file(const struct stat *a, const struct stat *b) {
        return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/* Whether the calling thread is where this process was moved. What is not known counts as that. */
static bool is_in_target(void) {
        struct stat now;

        return record.moved && (stat(MNT_NS, &now) < 0 || same_file(&now, &record.target));
}

bool begin_session(uid_t uid, uid_t *ret_first, bool *ret_refused) {
        LOCKED();

        if ((record.sessions > 0 || is_in_target()) && record.uid != uid)
                record.several = true;
        else if (record.sessions == 0)
                record.uid = uid;
        *ret_refused = record.refused > 0 && record.refused == record.sessions;
        record.sessions++;
        *ret_first = record.uid;
        return record.several;
}

/* libpam calls this when the handle ends, or opens a session again. */
static void end_refused_session(UNUSED pam_handle_t *pamh, UNUSED void *data, int status) {
        LOCKED();

        if ((status & ~PAM_DATA_SILENT) == PAM_SUCCESS || record.refused == 0) /* open, or closed meanwhile */
                return;
        record.refused--;
        record.sessions--;
        if (record.sessions == 0)
                record.several = false;
}

void note_refusal(const struct session *s) {
        acquire_lock();
        record.refused++;
        release_lock();
        (void) pam_set_data(s->pamh, "pam_polytmp_refused", &record, end_refused_session);
}

/* Whether / is a directory within a mount. What is not known is no. */
static bool is_below_a_mount(void) {
        struct statx root;

        return statx(AT_FDCWD, "/", 0, STATX_INO, &root) == 0 &&
               root.stx_attributes_mask & STATX_ATTR_MOUNT_ROOT && !(root.stx_attributes & STATX_ATTR_MOUNT_ROOT);
}

/* Returns a negative errno, or whether / is another directory than PID 1's. */
static int is_in_chroot(void) {
        struct stat root, init_root;

        if (stat("/", &root) < 0)
                return -errno;
        if (stat("/proc/1/root", &init_root) < 0) {
                int error = errno;

                return error == ENOENT && is_below_a_mount() ? 1 : -error;
        }
        return !same_file(&root, &init_root);
}

/* Checks for namespaces that the session must not leave. PAM_SUCCESS if there are none. */
int check_caller(const struct session *s) {
        struct stat thread, leader;
        int r;

        if (geteuid() != 0)
                return refuse(s, NULL, "the calling process is not root");
        r = is_in_chroot();
        if (r < 0)
                return refuse(s, NULL, "cannot compare / with /proc/1/root: %s", strerror(-r));
        if (r > 0) {
                pam_syslog(s->pamh, LOG_NOTICE, "user %s is in a chroot, keeping the chroot's /tmp", s->user);
                return PAM_IGNORE;
        }
        if (stat(MNT_NS, &thread) < 0 || stat("/proc/self/ns/mnt", &leader) < 0)
                return refuse(s, NULL, "cannot stat the mount namespace: %s", strerror(errno));
        if (!same_file(&thread, &leader))
                return refuse(s, NULL, "the calling thread is not in its process's mount namespace");
        return PAM_SUCCESS;
}

/* Users can make mount namespaces too (unshare -Urm): reject those of a user namespace other than ours. */
bool is_mount_namespace_of_ours(int fd) {
        CLEANUP(closep) int userns_fd = -1;
        struct stat theirs, ours;
        struct statfs fs;

        if (fstatfs(fd, &fs) < 0 || fs.f_type != NSFS_MAGIC || ioctl(fd, NS_GET_NSTYPE) != CLONE_NEWNS)
                return false;
        userns_fd = ioctl(fd, NS_GET_USERNS); /* is O_CLOEXEC: open_related_ns() in the kernel */
        return userns_fd >= 0 && fstat(userns_fd, &theirs) == 0 &&
               stat("/proc/thread-self/ns/user", &ours) == 0 && same_file(&theirs, &ours);
}

/* Moves the calling thread, and looks its working directory up again. Returns a negative errno. */
static int move(int ns_fd, char cwd[static PATH_MAX], bool *cwd_kept) {
        struct open_how how = { .flags = O_PATH | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS };
        CLEANUP(closep) int fd = -1;
        /* not libc's, which climbs ".." into another namespace's / if the kernel returns "(unreachable)/..." */
        bool reachable = syscall(SYS_getcwd, cwd, PATH_MAX) > 0 && cwd[0] == '/';

        if (!reachable)
                strcpy(cwd, "(unknown)");
        if (unshare(CLONE_FS) < 0 || setns(ns_fd, CLONE_NEWNS) < 0)
                return -errno;
        if (reachable)
                fd = (int) syscall(SYS_openat2, AT_FDCWD, cwd, &how, sizeof(how));
        *cwd_kept = fd >= 0 && fchdir(fd) == 0; /* otherwise stay where setns() has put us */
        return 0;
}

/* Before the process moves to target: remembers where it is. Returns a negative errno. The caller holds the lock. */
static int remember(const struct stat *target) {
        struct stat now, host;
        int fd = -1;

        if (stat(MNT_NS, &now) < 0 || stat(MNT_NS_OF_PID_1, &host) < 0)
                return -errno;
        if (record.moved && same_file(&now, &record.target)) {
                record.target = *target; /* from one namespace of the user to a newer one */
                return 0;
        }
        if (record.moved && record.sessions > 1) /* another thread was moved */
                return same_file(&now, &record.origin) && same_file(target, &record.target) ? 0 : -EBUSY;
        if (!same_file(&now, &host)) {
                CLEANUP(closep) int low = open(MNT_NS, O_RDONLY | O_CLOEXEC);

                fd = low < 0 ? -1 : fcntl(low, F_DUPFD_CLOEXEC, 3);
                if (fd < 0)
                        return -errno;
        }
        record.moved = true;
        record.origin = now;
        record.target = *target;
        record.origin_fd = fd;
        return 0;
}

/* The way back is not needed any more. record.moved stays: other threads may still be there. */
static void forget(void) {
        LOCKED();
        struct stat st;

        if (record.origin_fd >= 0 && fstat(record.origin_fd, &st) == 0 && same_file(&st, &record.origin))
                close(record.origin_fd);
        record.origin_fd = -1;
}

/* Moves the calling thread back to where its process came from. Returns NULL, or why that cannot be done. */
static const char *go_back(void) {
        CLEANUP(closep) int fd = -1;
        char cwd[PATH_MAX];
        struct stat now, origin;
        struct record r;
        bool kept;
        int error;

        acquire_lock();
        r = record;
        if (r.moved && r.origin_fd >= 0)
                fd = fcntl(r.origin_fd, F_DUPFD_CLOEXEC, 3);
        release_lock();
        if (!r.moved)
                return NULL;
        if (stat(MNT_NS, &now) < 0)
                return strerror(errno);
        if (same_file(&now, &r.origin))
                return NULL;
        if (!same_file(&now, &r.target))
                return "it is in a mount namespace of its own";
        error = is_in_chroot();
        if (error != 0)
                return error < 0 ? strerror(-error) : "it is in a chroot";
        if (fd < 0)
                fd = open(MNT_NS_OF_PID_1, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
                return strerror(errno);
        if (fstat(fd, &origin) < 0 || !same_file(&origin, &r.origin))
                return "the namespace that it came from cannot be found any more";
        error = move(fd, cwd, &kept);
        return error < 0 ? strerror(-error) : NULL;
}

int leave_for_several(const struct session *s, uid_t first) {
        const char *why = go_back();

        if (why && s->uid == 0) /* root is not locked out */
                pam_syslog(s->pamh, LOG_ERR, "the session of user %s is in the namespace of UID %u: %s",
                           s->user, first, why);
        else if (why)
                return refuse(s, NULL, "the process has a session of UID %u open, and cannot leave their namespace: %s",
                              first, why);
        else
                pam_syslog(s->pamh, LOG_WARNING,
                           "this process opens sessions for several users (UID %u, now user %s), "
                           "so it stays in the directories that it came from", first, s->user);
        return PAM_IGNORE;
}

int enter_namespace(const struct session *s, int ns_fd) {
        char cwd[PATH_MAX];
        struct stat target, now;
        bool several, kept = true;
        int r;

        if (fstat(ns_fd, &target) < 0 || stat(MNT_NS, &now) < 0)
                return refuse(s, NULL, "cannot stat the mount namespace: %s", strerror(errno));
        if (!same_file(&target, &now)) {
                acquire_lock();
                several = record.several;
                r = several ? 0 : remember(&target);
                release_lock();
                if (several) /* since we asked, another thread has opened a session for another user */
                        return leave_for_several(s, s->uid);
                if (r < 0)
                        return refuse(s, NULL, "cannot keep the way back: %s", strerror(-r));
                r = move(ns_fd, cwd, &kept);
                if (r < 0) {
                        forget();
                        return refuse(s, NULL, "cannot join the namespace: %s", strerror(-r));
                }
        }
        if (!kept)
                pam_syslog(s->pamh, LOG_NOTICE,
                           "working directory %s is not available in the namespace of user %s, using /", cwd, s->user);
        if (s->debug)
                pam_syslog(s->pamh, LOG_DEBUG, "user %s is in mnt:[%ju]", s->user, (uintmax_t) target.st_ino);
        return PAM_SUCCESS;
}

/* A namespace ends with its last process, so nothing depends on this: close hooks may not run (systemd#8598).
 * It is for processes that live on. */
void end_session(const struct session *s) {
        const char *why = NULL;
        bool last, several;

        acquire_lock();
        if (record.sessions > 0)
                record.sessions--;
        if (record.refused > record.sessions)
                record.refused = record.sessions;
        last = record.sessions == 0;
        several = record.several;
        if (last)
                record.several = false;
        release_lock();
        if (!last && !several) /* the user has another session in this process */
                return;
        if (geteuid() != 0) /* has become the user's, like (sd-pam) */
                return;
        why = go_back();
        if (why)
                pam_syslog(s->pamh, LOG_WARNING, "cannot go back to the directories before the session of user %s: %s",
                           s->user, why);
        else if (last)
                forget();
}
