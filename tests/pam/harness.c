/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Opens a PAM session as login programs do and prints, as JSON, what became of the process.
 * It judges nothing: the tests do.
 */

#include <errno.h>
#include <fcntl.h>
#include <dirent.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pwd.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#include <security/pam_appl.h>

static struct options {
        const char *service, *user, *cwd, *chroot, *look, *thread_namespace;
        char *steps;
        int threads, opens, flags, euid, fail_alloc;
        bool rmdir, second_thread, shared_fs;
} o = { .service = "polytmp-test", .user = "alice", .opens = 1, .euid = -1, .fail_alloc = -1 };

extern char **environ;
static char messages[16384];

/* Allocations made by the session calls, one of which fails. ASan has its own malloc(). */
static __thread bool counting;
static __thread int allocations;
#ifndef __SANITIZE_ADDRESS__
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);

static bool fails(void) {
        return counting && allocations++ == o.fail_alloc;
}

void *malloc(size_t n) {
        return fails() ? (errno = ENOMEM, NULL) : __libc_malloc(n);
}

void *calloc(size_t n, size_t m) {
        return fails() ? (errno = ENOMEM, NULL) : __libc_calloc(n, m);
}

void *realloc(void *p, size_t n) {
        return fails() ? (errno = ENOMEM, NULL) : __libc_realloc(p, n);
}
#endif

static void die(const char *what) {
        perror(what);
        exit(3);
}

static void print_string(FILE *f, const char *s) {
        fputc('"', f);
        for (; *s; s++)
                if ((unsigned char) *s < ' ' || *s == '"' || *s == '\\')
                        fprintf(f, "\\u%04x", (unsigned char) *s);
                else
                        fputc(*s, f);
        fputc('"', f);
}

static int converse(int n, const struct pam_message **msg, struct pam_response **resp, void *data) {
        bool was_counting = counting;
        FILE *f;

        (void) data;
        counting = false;
        f = fmemopen(messages + strlen(messages), sizeof(messages) - strlen(messages), "w");
        if (!f)
                die("fmemopen");
        for (int i = 0; i < n; i++) {
                fprintf(f, "%s[%d, ", *messages ? ", " : "", msg[i]->msg_style);
                print_string(f, msg[i]->msg);
                fputc(']', f);
        }
        fclose(f);
        *resp = calloc((size_t) n, sizeof(**resp));
        counting = was_counting;
        return *resp ? PAM_SUCCESS : PAM_BUF_ERR;
}

static int count_fds(void) {
        DIR *d = opendir("/proc/thread-self/fd");
        int n = -1; /* itself */

        if (!d)
                die("/proc/thread-self/fd");
        for (struct dirent *e; (e = readdir(d));)
                n += e->d_name[0] != '.';
        closedir(d);
        return n;
}

static uintmax_t inode(const char *path) {
        struct stat st;

        return stat(path, &st) < 0 ? 0 : (uintmax_t) st.st_ino;
}

/* Where a process is at one moment. */
struct view {
        uintmax_t namespace, leader, directory;
        int fds;
        bool seen;
        char cwd[PATH_MAX];
};

static void look(struct view *v) {
        v->namespace = inode("/proc/thread-self/ns/mnt");
        v->leader = inode("/proc/self/ns/mnt");
        v->directory = inode(".");
        v->fds = count_fds();
        v->seen = o.look && access(o.look, F_OK) == 0;
        if (!getcwd(v->cwd, sizeof(v->cwd)))
                v->cwd[0] = '\0';
}

static void print_view(const char *prefix, const struct view *v) {
        printf("\"%snamespace\": %ju, \"%sdirectory\": %ju, \"%sfds\": %d, \"%sseen\": %d, \"%scwd\": ", prefix,
               v->namespace, prefix, v->directory, prefix, v->fds, prefix, v->seen, prefix);
        print_string(stdout, v->cwd);
        printf(", ");
}

static void *sleeper(void *unused) {
        (void) unused;
        for (;;)
                pause();
        return NULL;
}

static void prepare(void) {
        if (o.thread_namespace) {
                int fd = open(o.thread_namespace, O_RDONLY | O_CLOEXEC);

                if (fd < 0 || unshare(CLONE_FS) < 0 || setns(fd, CLONE_NEWNS) < 0)
                        die(o.thread_namespace);
                close(fd);
        }
        if (o.cwd && chdir(o.cwd) < 0)
                die(o.cwd);
        if (o.rmdir && rmdir(o.cwd) < 0)
                die(o.cwd);
        if (o.chroot && (chroot(o.chroot) < 0 || chdir("/") < 0))
                die(o.chroot);
        for (int i = 0; i < o.threads; i++) {
                pthread_t t;

                if (pthread_create(&t, NULL, sleeper, NULL) != 0)
                        die("pthread_create");
        }
        if (o.euid >= 0 && seteuid((uid_t) o.euid) < 0)
                die("seteuid");
        /* what libc opens once and keeps */
        openlog("harness", 0, LOG_AUTHPRIV);
        syslog(LOG_DEBUG, "warm up");
        getpwnam(o.user);
}

static void *session(void *unused) {
        struct pam_conv conv = { converse, NULL };
        pam_handle_t *pamh = NULL;
        struct timespec t0, t1;
        struct view in_session = { 0 }, after = { 0 };
        uintmax_t before, cwd_inode;
        int fds, environment = 0, r = PAM_SUCCESS, closed = PAM_SUCCESS;

        (void) unused;
        prepare();
        if (pam_start(o.service, o.user, &conv, &pamh) != PAM_SUCCESS)
                die("pam_start");
        before = inode("/proc/thread-self/ns/mnt");
        cwd_inode = inode(".");
        fds = count_fds();
        for (char **e = environ; *e; e++)
                environment++;
        printf("{\"results\": [");
        clock_gettime(CLOCK_MONOTONIC, &t0);
        for (int i = 0; i < o.opens; i++) {
                allocations = 0;
                counting = true;
                r = pam_open_session(pamh, o.flags);
                counting = false;
                printf("%s%d", i ? ", " : "", r);
                if (i == o.opens - 1)
                        look(&in_session);
                if (r == PAM_SUCCESS)
                        closed = pam_close_session(pamh, 0);
        }
        clock_gettime(CLOCK_MONOTONIC, &t1);
        for (char **e = environ; *e; e++)
                environment--;
        printf("], \"closed\": %d, \"namespace_before\": %ju, \"directory_before\": %ju, \"leader\": %ju, ", closed,
               before, cwd_inode, in_session.leader);
        printf("\"environment\": %d, \"seconds\": %.3f, \"allocations\": %d, \"fds_before\": %d, ", environment,
               (double) (t1.tv_sec - t0.tv_sec) + (double) (t1.tv_nsec - t0.tv_nsec) / 1e9, allocations, fds);
        print_view("", &in_session);
        look(&after);
        print_view("after_", &after);
        printf("\"messages\": [%s]}\n", messages);
        pam_end(pamh, r);
        if (o.euid >= 0 && (seteuid(0) < 0 || prctl(PR_SET_DUMPABLE, 1) < 0)) /* the leak checker wants to ptrace */
                die("seteuid");
        return NULL;
}

/*
 * Steps, as a server takes them that opens each session with a handle of its own and ends the handle at once:
 * +USER opens, -USER closes, ?USER opens and ends the handle with the result, "fork" goes on in a child, "thread" in a thread, "close" closes all descriptors,
 * "reuse" opens PID 1's namespace on several of them, "chroot" goes to /tmp/chroot, "own" unshares the mount namespace, "drop" becomes UID 1500.
 */
static void *run(void *text) {
        struct pam_conv conv = { converse, NULL };
        char *rest = NULL;

        for (char *step = strtok_r(text, ",", &rest); step; step = strtok_r(NULL, ",", &rest)) {
                int r = PAM_SUCCESS, status;
                struct view v = { 0 };

                if (*step == '+' || *step == '-' || *step == '?') {
                        pam_handle_t *pamh = NULL;

                        if (pam_start(o.service, step + 1, &conv, &pamh) != PAM_SUCCESS)
                                die("pam_start");
                        r = *step == '-' ? pam_close_session(pamh, 0) : pam_open_session(pamh, o.flags);
                        pam_end(pamh, *step == '?' ? r : PAM_SUCCESS);
                } else if (strcmp(step, "fork") == 0) {
                        pid_t pid;

                        fflush(stdout);
                        pid = fork();
                        if (pid < 0 || (pid > 0 && waitpid(pid, &status, 0) != pid))
                                die("fork");
                        if (pid > 0)
                                _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 4);
                } else if (strcmp(step, "thread") == 0) {
                        pthread_t t;

                        if (pthread_create(&t, NULL, run, rest) != 0 || pthread_join(t, NULL) != 0)
                                die("pthread");
                        return NULL;
                } else if (strcmp(step, "close") == 0) {
                        if (close_range(3, ~0U, 0) < 0)
                                die("close_range");
                } else if (strcmp(step, "reuse") == 0) {
                        for (int i = 0; i < 8; i++)
                                if (open("/proc/1/ns/mnt", O_RDONLY | O_CLOEXEC) < 0)
                                        die("/proc/1/ns/mnt");
                } else if (strcmp(step, "chroot") == 0) {
                        if (chroot("/tmp/chroot") < 0 || chdir("/") < 0)
                                die("chroot");
                } else if (strcmp(step, "own") == 0) {
                        if (unshare(CLONE_NEWNS) < 0)
                                die("unshare");
                } else if (strcmp(step, "drop") == 0) {
                        if (seteuid(1500) < 0)
                                die("seteuid");
                } else
                        exit(2);
                look(&v);
                printf("{\"step\": ");
                print_string(stdout, step);
                printf(", ");
                print_view("", &v);
                printf("\"result\": %d}\n", r);
        }
        if (geteuid() != 0 && (seteuid(0) < 0 || prctl(PR_SET_DUMPABLE, 1) < 0))
                die("seteuid");
        return NULL;
}

static void parse(int argc, char **argv) {
        for (int c; (c = getopt(argc, argv, "s:u:w:r:l:n:t:o:e:a:S:qdTF")) != -1;)
                switch (c) {
                case 'S': o.steps = optarg; break;
                case 's': o.service = optarg; break;
                case 'u': o.user = optarg; break;
                case 'w': o.cwd = optarg; break;
                case 'd': o.rmdir = true; break;
                case 'r': o.chroot = optarg; break;
                case 'l': o.look = optarg; break;
                case 'n': o.thread_namespace = optarg; break;
                case 't': o.threads = atoi(optarg); break;
                case 'o': o.opens = atoi(optarg); break;
                case 'e': o.euid = atoi(optarg); break;
                case 'a': o.fail_alloc = atoi(optarg); break;
                case 'q': o.flags |= PAM_SILENT; break;
                case 'T': o.second_thread = true; break;
                case 'F': o.shared_fs = true; break;
                default: exit(2);
                }
}

int main(int argc, char **argv) {
        parse(argc, argv);
        if (o.steps) {
                prepare();
                run(o.steps);
                return 0;
        }
        if (o.shared_fs) { /* as vfork() and threads do: a child that shares root and working directory */
                int status;
                pid_t pid = (pid_t) syscall(SYS_clone, CLONE_FS | SIGCHLD, NULL, NULL, NULL, NULL);

                if (pid < 0 || (pid > 0 && waitpid(pid, &status, 0) != pid))
                        die("clone");
                if (pid > 0)
                        _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 4);
        }
        if (o.second_thread) {
                pthread_t t;

                if (pthread_create(&t, NULL, session, NULL) != 0 || pthread_join(t, NULL) != 0)
                        die("pthread");
                return 0;
        }
        session(NULL);
        return 0;
}
