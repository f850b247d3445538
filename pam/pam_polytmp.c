/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * pam_polytmp: moves a session into its user's mount namespace.
 *
 * Asks polytmpd for the user's namespace (AcquireNamespace) and joins it. polytmpd decides who gets one, what is
 * in it and when it ends. This module decides what happens if polytmpd cannot be reached.
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
 *  - sd-bus reads DBUS_SYSTEM_BUS_ADDRESS with secure_getenv(3): su and sudo are set-user-ID (AT_SECURE), so
 *    their callers cannot redirect the request.
 *  - sd_bus_call() and sd_bus_flush() first wait for the connection to be set up, up to 90 s, whatever the
 *    call's timeout. Hence await_reply(), and a close without flush, which withdraws an unanswered request.
 *  - The bus returns NoReply if the service ends. Asked again, it has systemd start the service, or waits.
 */

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <linux/nsfs.h>
#include <linux/openat2.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#include <security/pam_ext.h>
#include <security/pam_modules.h>
#include <security/pam_modutil.h>
#include <systemd/sd-bus.h>

#define EXPORT __attribute__((visibility("default")))
#define CLEANUP(function) __attribute__((cleanup(function)))
#define UNUSED __attribute__((unused))

#define USEC_PER_SEC UINT64_C(1000000)
#define TIMEOUT_DEFAULT 20
#define TIMEOUT_MAX 600
#define UID_MIN_DEFAULT 1000
#define UID_MAX_DEFAULT 60000

struct session {
        pam_handle_t *pamh;
        int flags;
        const char *user;
        uid_t uid;
        unsigned long timeout; /* seconds, for connection, authentication and reply together */
        bool debug;
};

static void closep(int *fd) {
        if (*fd >= 0)
                close(*fd);
}

static void freep(char **p) {
        free(*p);
}

static int out_of_memory(const struct session *s) {
        pam_syslog(s->pamh, LOG_CRIT, "out of memory");
        return PAM_BUF_ERR;
}

/* One line for the log and one for the user, without the name of the D-Bus error. */
__attribute__((format(printf, 3, 4)))
static int refuse(const struct session *s, const char *error_name, const char *format, ...) {
        CLEANUP(freep) char *reason = NULL;
        va_list ap;
        int n;

        va_start(ap, format);
        n = vasprintf(&reason, format, ap);
        va_end(ap);
        if (n < 0) {
                reason = NULL; /* vasprintf(3): undefined on failure */
                return out_of_memory(s);
        }
        for (int i = 0; i < n; i++) /* untrusted text for a log and a terminal */
                reason[i] = iscntrl((unsigned char) reason[i]) ? ' ' : reason[i];
        reason[n > 0 && reason[n - 1] == '.' ? n - 1 : n] = '\0'; /* the user's line continues after it */
        pam_syslog(s->pamh, LOG_ERR, "no private /tmp for user %s, refusing the session: %s%s%s",
                   s->user, error_name ? error_name : "", error_name ? ": " : "", reason);
        if (!(s->flags & PAM_SILENT))
                pam_error(s->pamh, "polytmp: cannot give you a private /tmp: %s; ask your administrator",
                          reason);
        return PAM_PERM_DENIED; /* a session error would not stop sudo */
}

static bool parse_number(const char *text, unsigned long max, unsigned long *ret) {
        unsigned long value;
        char *end;

        if (!isdigit((unsigned char) text[0])) /* strtoul() accepts blanks and signs */
                return false;
        errno = 0;
        value = strtoul(text, &end, 10);
        if (errno != 0 || *end != '\0' || value > max)
                return false;
        *ret = value;
        return true;
}

/* A typo must not lock everyone out: log what is wrong and ignore it. */
static void parse_arguments(struct session *s, int argc, const char **argv) {
        s->timeout = TIMEOUT_DEFAULT;
        for (int i = 0; i < argc; i++) {
                unsigned long value;

                if (strcmp(argv[i], "debug") == 0)
                        s->debug = true;
                else if (strncmp(argv[i], "timeout=", strlen("timeout=")) != 0)
                        pam_syslog(s->pamh, LOG_ERR, "unknown module argument '%s', ignoring", argv[i]);
                else if (parse_number(argv[i] + strlen("timeout="), TIMEOUT_MAX, &value) && value > 0)
                        s->timeout = value;
                else
                        pam_syslog(s->pamh, LOG_ERR, "'%s' is not a number of seconds from 1 to %d, using %d",
                                   argv[i], TIMEOUT_MAX, TIMEOUT_DEFAULT);
        }
}

static int find_user(struct session *s) {
        const void *item = NULL;
        const struct passwd *pw;

        if (pam_get_item(s->pamh, PAM_USER, &item) != PAM_SUCCESS || !item || !*(const char *) item) {
                pam_syslog(s->pamh, LOG_ERR, "the session has no user name");
                return PAM_USER_UNKNOWN;
        }
        s->user = item;
        errno = 0;
        pw = pam_modutil_getpwnam(s->pamh, s->user);
        if (!pw) {
                if (errno == ENOMEM)
                        return out_of_memory(s);
                pam_syslog(s->pamh, LOG_ERR, "user unknown: %s", s->user);
                return PAM_USER_UNKNOWN;
        }
        s->uid = pw->pw_uid;
        return PAM_SUCCESS;
}

static unsigned long login_defs(pam_handle_t *pamh, const char *key, unsigned long fallback) {
        CLEANUP(freep) char *text = pam_modutil_search_key(pamh, "/etc/login.defs", key);
        unsigned long value;

        return text && parse_number(text, UINT32_MAX - 1, &value) ? value : fallback;
}

static bool is_system_user(const struct session *s) {
        unsigned long min = login_defs(s->pamh, "UID_MIN", UID_MIN_DEFAULT);
        unsigned long max = login_defs(s->pamh, "UID_MAX", UID_MAX_DEFAULT);

        if (min > max) /* or every user would be one */
                return s->uid < UID_MIN_DEFAULT || s->uid > UID_MAX_DEFAULT;
        return s->uid < min || s->uid > max;
}

static bool same_file(const struct stat *a, const struct stat *b) {
        return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/* Checks for namespaces that the session must not leave. PAM_SUCCESS if there are none. */
static int check_caller(const struct session *s) {
        struct stat root, init_root, thread, leader;

        if (geteuid() != 0)
                return refuse(s, NULL, "the calling process is not root");
        if (stat("/", &root) < 0)
                return refuse(s, NULL, "cannot stat /: %s", strerror(errno));
        if (stat("/proc/1/root", &init_root) < 0) {
                if (errno != ENOENT)
                        return refuse(s, NULL, "cannot stat /proc/1/root: %s", strerror(errno));
                memset(&init_root, 0, sizeof(init_root)); /* only a chroot has no /proc */
        }
        if (!same_file(&root, &init_root)) {
                pam_syslog(s->pamh, LOG_NOTICE, "user %s is in a chroot, keeping the chroot's /tmp", s->user);
                return PAM_IGNORE;
        }
        if (stat("/proc/thread-self/ns/mnt", &thread) < 0 || stat("/proc/self/ns/mnt", &leader) < 0)
                return refuse(s, NULL, "cannot stat the mount namespace: %s", strerror(errno));
        if (!same_file(&thread, &leader))
                return refuse(s, NULL, "the calling thread is not in its process's mount namespace");
        return PAM_SUCCESS;
}

static bool is_unreachable(const sd_bus_error *error) {
        static const char *const NAMES[] = { /* a name that ends in a dot is a prefix */
                SD_BUS_ERROR_SERVICE_UNKNOWN, SD_BUS_ERROR_NAME_HAS_NO_OWNER, SD_BUS_ERROR_NO_REPLY,
                SD_BUS_ERROR_DISCONNECTED, SD_BUS_ERROR_NO_SERVER, SD_BUS_ERROR_LIMITS_EXCEEDED,
                SD_BUS_ERROR_TIMEOUT, "org.freedesktop.DBus.Error.TimedOut", "org.freedesktop.DBus.Error.Spawn.",
                "org.freedesktop.systemd1.", /* from activation: UnitMasked, NoSuchUnit, ... */
        };

        for (size_t i = 0; i < sizeof(NAMES) / sizeof(NAMES[0]); i++) {
                size_t n = strlen(NAMES[i]);

                if (strncmp(error->name, NAMES[i], NAMES[i][n - 1] == '.' ? n : n + 1) == 0)
                        return true;
        }
        return false;
}

/* System users (cron jobs, the boot of the host) must keep working while polytmpd is not running. */
static int unreachable(const struct session *s, const char *error_name, const char *why) {
        if (!is_system_user(s))
                return refuse(s, error_name, "polytmpd cannot be reached: %s", why);
        pam_syslog(s->pamh, LOG_WARNING,
                   "system user %s keeps the shared /tmp, polytmpd cannot be reached: %s%s%s",
                   s->user, error_name ? error_name : "", error_name ? ": " : "", why);
        return PAM_IGNORE;
}

static int error_reply(const struct session *s, const sd_bus_error *error) {
        const char *message = error->message && *error->message ? error->message : error->name;

        if (strcmp(error->name, "org.polytmp1.Error.Exempt") == 0) {
                if (s->debug)
                        pam_syslog(s->pamh, LOG_DEBUG, "user %s is exempt", s->user);
                return PAM_IGNORE;
        }
        if (is_unreachable(error))
                return unreachable(s, error->name, message);
        return refuse(s, error->name, "%s", message);
}

static uint64_t now_usec(void) {
        struct timespec ts;

        clock_gettime(CLOCK_MONOTONIC, &ts);
        return (uint64_t) ts.tv_sec * USEC_PER_SEC + (uint64_t) ts.tv_nsec / 1000;
}

static int keep_reply(sd_bus_message *m, void *reply, UNUSED sd_bus_error *error) {
        *(sd_bus_message **) reply = sd_bus_message_ref(m);
        return 0;
}

static int await_reply(sd_bus *bus, sd_bus_message **reply, uint64_t deadline) {
        for (;;) {
                int r = sd_bus_process(bus, NULL);
                uint64_t now;

                if (*reply) /* before r: the connection may end right after its last message */
                        return 0;
                now = now_usec();
                if (r >= 0 && now >= deadline)
                        return -ETIMEDOUT;
                if (r == 0)
                        r = sd_bus_wait(bus, deadline - now);
                if (r < 0 && r != -EINTR)
                        return r;
        }
}

/* Returns 0 with a reply or an error reply, or a negative errno. The caller unrefs bus and reply. */
static int ask(const struct session *s, sd_bus **bus, sd_bus_message **reply) {
        CLEANUP(sd_bus_message_unrefp) sd_bus_message *call = NULL;
        uint64_t deadline = now_usec() + s->timeout * USEC_PER_SEC;
        int r = sd_bus_open_system(bus);

        if (r >= 0)
                r = sd_bus_message_new_method_call(*bus, &call, "org.polytmp1", "/org/polytmp1",
                                                   "org.polytmp1.Manager", "AcquireNamespace");
        if (r >= 0)
                r = sd_bus_message_append(call, "u", (uint32_t) s->uid);
        for (int died = 0; r >= 0 && died < 2;) {
                *reply = sd_bus_message_unref(*reply);
                r = sd_bus_call_async(*bus, NULL, call, keep_reply, reply, UINT64_MAX);
                if (r >= 0)
                        r = await_reply(*bus, reply, deadline);
                if (r >= 0 && sd_bus_message_is_method_error(*reply, SD_BUS_ERROR_NO_REPLY))
                        died++; /* polytmpd ended before it replied: ask once more */
                else if (r >= 0 && sd_bus_message_is_method_error(*reply, SD_BUS_ERROR_LIMITS_EXCEEDED) &&
                         now_usec() + 50000 < deadline)
                        usleep(50000); /* polytmpd's queue is full, which must not lock users out */
                else
                        break;
        }
        return r;
}

/* On PAM_SUCCESS the caller closes *ret_fd. The connection and the descriptors received on it are closed. */
static int acquire_namespace(const struct session *s, int *ret_fd) {
        CLEANUP(sd_bus_close_unrefp) sd_bus *bus = NULL;
        CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
        int fd, r = ask(s, &bus, &reply);

        if (r < 0)
                return r == -ENOMEM ? out_of_memory(s) : unreachable(s, NULL, strerror(-r));
        if (sd_bus_message_is_method_error(reply, NULL))
                return error_reply(s, sd_bus_message_get_error(reply));
        r = sd_bus_message_has_signature(reply, "h") ? sd_bus_message_read(reply, "h", &fd) : -EPROTO;
        if (r < 0)
                return refuse(s, NULL, "polytmpd's reply contains no namespace: %s", strerror(-r));
        *ret_fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
        if (*ret_fd < 0)
                return refuse(s, NULL, "cannot duplicate the namespace descriptor: %s", strerror(errno));
        return PAM_SUCCESS;
}

/* Users can make mount namespaces too (unshare -Urm): reject those of a user namespace other than ours. */
static bool is_mount_namespace_of_ours(int fd) {
        CLEANUP(closep) int userns_fd = -1;
        struct stat theirs, ours;
        struct statfs fs;

        if (fstatfs(fd, &fs) < 0 || fs.f_type != NSFS_MAGIC || ioctl(fd, NS_GET_NSTYPE) != CLONE_NEWNS)
                return false;
        userns_fd = ioctl(fd, NS_GET_USERNS); /* is O_CLOEXEC: open_related_ns() in the kernel */
        return userns_fd >= 0 && fstat(userns_fd, &theirs) == 0 &&
               stat("/proc/thread-self/ns/user", &ours) == 0 && same_file(&theirs, &ours);
}

static void restore_working_directory(const struct session *s, const char *path) {
        struct open_how how = { .flags = O_PATH | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS };
        CLEANUP(closep) int fd = path ? (int) syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof(how)) : -1;

        if (fd >= 0 && fchdir(fd) == 0)
                return; /* otherwise stay where setns() has put us */
        pam_syslog(s->pamh, LOG_NOTICE, "working directory %s is not available in the namespace of user %s, using /",
                   path ? path : "(unknown)", s->user);
}

static int enter_namespace(const struct session *s, int ns_fd) {
        char cwd[PATH_MAX];
        /* not libc's, which climbs ".." into another namespace's / if the kernel returns "(unreachable)/..." */
        bool reachable = syscall(SYS_getcwd, cwd, sizeof(cwd)) > 0 && cwd[0] == '/';

        if (unshare(CLONE_FS) < 0)
                return refuse(s, NULL, "cannot unshare the working directory: %s", strerror(errno));
        if (setns(ns_fd, CLONE_NEWNS) < 0)
                return refuse(s, NULL, "cannot join the namespace: %s", strerror(errno));
        restore_working_directory(s, reachable ? cwd : NULL);
        return PAM_SUCCESS;
}

static int open_session(struct session *s) {
        CLEANUP(closep) int fd = -1;
        struct stat theirs, ours;
        int r = check_caller(s);

        if (r != PAM_SUCCESS)
                return r;
        if (s->debug)
                pam_syslog(s->pamh, LOG_DEBUG, "requesting the namespace of user %s (%lu s)", s->user, s->timeout);
        r = acquire_namespace(s, &fd);
        if (r != PAM_SUCCESS)
                return r;
        if (!is_mount_namespace_of_ours(fd))
                return refuse(s, NULL, "polytmpd's reply is not a mount namespace of this host");
        if (fstat(fd, &theirs) < 0 || stat("/proc/thread-self/ns/mnt", &ours) < 0)
                return refuse(s, NULL, "cannot stat the mount namespace: %s", strerror(errno));
        r = same_file(&theirs, &ours) ? PAM_SUCCESS : enter_namespace(s, fd);
        if (r == PAM_SUCCESS && s->debug)
                pam_syslog(s->pamh, LOG_DEBUG, "user %s is in mnt:[%ju]", s->user, (uintmax_t) theirs.st_ino);
        return r;
}

EXPORT int pam_sm_open_session(pam_handle_t *pamh, int flags, int argc, const char **argv) {
        struct session s = { .pamh = pamh, .flags = flags };
        int saved_errno = errno;
        int r = find_user(&s);

        if (r == PAM_SUCCESS && s.uid == 0)
                r = PAM_IGNORE; /* root is never moved, and polytmpd is not asked */
        else if (r == PAM_SUCCESS) {
                parse_arguments(&s, argc, argv);
                r = open_session(&s);
        }
        errno = saved_errno;
        return r;
}

/* Nothing to undo: a namespace ends with its last process, and close hooks may not run (systemd#8598). */
EXPORT int pam_sm_close_session(UNUSED pam_handle_t *h, UNUSED int flags, UNUSED int n, UNUSED const char **v) {
        return PAM_SUCCESS;
}
