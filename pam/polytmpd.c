/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Asks polytmpd for the user's namespace on its socket, and decides what each reply means for the session.
 * pam_polytmp(8) has the protocol.
 *
 * Not here: joining the namespace (namespace.c).
 *
 * Hard facts:
 *  - The socket is systemd's. While polytmpd is down, the request waits in the kernel's queue. If the queue is
 *    full, connect(2) waits: for SO_SNDTIMEO, then it fails with EAGAIN.
 *  - The kernel accepts the request before polytmpd does. If polytmpd ends before it replies, what it has
 *    accepted gets an end of file or ECONNRESET; what is still in the queue waits for the next polytmpd.
 *  - recvmsg(2) with too little room for descriptors closes what does not fit, and sets MSG_CTRUNC.
 */

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#include <security/pam_ext.h>

#include "pam_polytmp.h"

#define SOCKET_PATH "/run/polytmpd/login"
#define USEC_PER_SEC INT64_C(1000000)
#define ATTEMPTS 2
#define SYSTEM_USER_TIMEOUT 5 /* seconds: a daemon that is restarted needs less */
#define REPLY_MAX 4096
#define FDS_MAX 4

/* How long a session waits. */
struct limit {
        const struct passwd *pw;
        int64_t deadline;
        int64_t last; /* the deadline, unless the user is a system user */
};

struct reply {
        char text[REPLY_MAX + 1];
        int fds[FDS_MAX];
        size_t n_fds;
        bool foreign; /* not from root: there is no reply */
};

static void close_fds(struct reply *reply) {
        while (reply->n_fds > 0)
                close(reply->fds[--reply->n_fds]);
}

static int64_t now_usec(void) {
        struct timespec ts;

        clock_gettime(CLOCK_MONOTONIC, &ts);
        return ts.tv_sec * USEC_PER_SEC + ts.tv_nsec / 1000;
}

static struct limit begin_to_wait(const struct session *s) {
        int64_t now = now_usec(), seconds = (int64_t) s->timeout;

        return (struct limit) {
                .pw = s->pw,
                .deadline = now + (seconds < SYSTEM_USER_TIMEOUT ? seconds : SYSTEM_USER_TIMEOUT) * USEC_PER_SEC,
                .last = now + seconds * USEC_PER_SEC,
        };
}

/* Who the user is costs more than the wait for most replies: it is found out when the wait becomes long. */
static bool has_time(struct limit *limit) {
        if (now_usec() >= limit->deadline && limit->deadline < limit->last && !is_certainly_system_user(limit->pw))
                limit->deadline = limit->last;
        return now_usec() < limit->deadline;
}

/* Microseconds, at least one: 0 would be no limit. */
static int64_t left_until(int64_t deadline) {
        int64_t left = deadline - now_usec();

        return left > 0 ? left : 1;
}

/* Returns a connected socket, which the caller closes, or a negative errno. */
static int connect_within(struct limit *limit) {
        struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = SOCKET_PATH };
        int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

        if (fd < 0)
                return -errno;
        for (;;) {
                int64_t left = left_until(limit->deadline);
                struct timeval timeout = { .tv_sec = left / USEC_PER_SEC, .tv_usec = left % USEC_PER_SEC };
                int error;

                if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)) == 0 &&
                    connect(fd, (const struct sockaddr *) &address, sizeof(address)) == 0)
                        return fd;
                error = errno;
                if ((error == EINTR || error == EAGAIN) && has_time(limit))
                        continue;
                close(fd);
                return error == EAGAIN || error == EINTR ? -ETIMEDOUT : -error;
        }
}

/* Who called listen(2): PID 1, or polytmpd. */
static bool is_listener_root(int fd) {
        struct ucred peer;
        socklen_t size = sizeof(peer);

        return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == 0;
}

static int wait_for_reply(int fd, struct limit *limit) {
        struct pollfd pollfd = { .fd = fd, .events = POLLIN };

        for (;;) {
                int r = poll(&pollfd, 1, (int) (left_until(limit->deadline) / 1000 + 1));

                if (r > 0)
                        return 0;
                if (r < 0 && errno != EINTR)
                        return -errno;
                if (!has_time(limit))
                        return -ETIMEDOUT;
        }
}

static void take_fds(struct msghdr *message, struct reply *reply) {
        for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
                size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

                if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
                        continue;
                for (size_t i = 0; i < n && reply->n_fds < FDS_MAX; i++) /* never more: there is no room */
                        memcpy(&reply->fds[reply->n_fds++], CMSG_DATA(c) + i * sizeof(int), sizeof(int));
        }
}

/* Returns 0 with a reply, -ECONNRESET if there is none, -EPROTO if it is none, or another negative errno. */
static int receive(int fd, struct reply *reply) {
        union {
                struct cmsghdr align;
                char room[CMSG_SPACE(FDS_MAX * sizeof(int))];
        } control;
        struct iovec data = { .iov_base = reply->text, .iov_len = REPLY_MAX };
        struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1,
                                  .msg_control = &control, .msg_controllen = sizeof(control) };
        ssize_t n = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

        if (n < 0)
                return -errno;
        take_fds(&message, reply);
        if (n == 0 && reply->n_fds == 0)
                return -ECONNRESET;
        reply->text[n] = '\0';
        if ((message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) || strlen(reply->text) != (size_t) n)
                return -EPROTO;
        for (ssize_t i = 0; i < n; i++) /* it is for a log and a terminal */
                if (iscntrl((unsigned char) reply->text[i]))
                        reply->text[i] = ' ';
        return 0;
}

/* Returns 0 with a reply, or a negative errno. The caller closes the reply's descriptors in both cases. */
static int ask(const struct session *s, struct reply *reply) {
        struct limit limit = begin_to_wait(s);
        char request[sizeof("acquire 4294967295")];
        int n = snprintf(request, sizeof(request), "acquire %u", (unsigned) s->uid);
        int r = -ECONNRESET;

        for (int i = 0; i < ATTEMPTS && (r == -ECONNRESET || r == -EPIPE); i++) { /* polytmpd ended */
                CLEANUP(closep) int fd = connect_within(&limit);

                if (fd < 0)
                        return fd;
                if (!is_listener_root(fd)) {
                        reply->foreign = true;
                        return 0;
                }
                r = send(fd, request, (size_t) n, MSG_NOSIGNAL) < 0 ? -errno : wait_for_reply(fd, &limit);
                if (r >= 0)
                        r = receive(fd, reply);
        }
        return r;
}

static const char *after(const char *text, const char *word) {
        size_t n = strlen(word);

        return strncmp(text, word, n) == 0 && (text[n] == ' ' || text[n] == '\0') ? text + n : NULL;
}

static int refused(const struct session *s, char *name) {
        char *text = strchr(name, ' ');

        if (text)
                *text++ = '\0';
        return refuse(s, name, "%s", text && *text ? text : name);
}

static int decide(const struct session *s, struct reply *reply, int *ret_fd) {
        if (strcmp(reply->text, "namespace") == 0 && reply->n_fds == 1) {
                *ret_fd = fcntl(reply->fds[0], F_DUPFD_CLOEXEC, 3);
                if (*ret_fd < 0)
                        return refuse(s, NULL, "cannot duplicate the namespace descriptor: %s", strerror(errno));
                return PAM_SUCCESS;
        }
        if (reply->n_fds == 0 && after(reply->text, "exempt")) {
                if (s->debug)
                        pam_syslog(s->pamh, LOG_DEBUG, "user %s is exempt", s->user);
                return PAM_IGNORE;
        }
        if (reply->n_fds == 0 && after(reply->text, "refused") && strlen(reply->text) > strlen("refused "))
                return refused(s, reply->text + strlen("refused "));
        return refuse(s, NULL, "polytmpd's reply contains no namespace: %s", strerror(EPROTO));
}

int acquire_namespace(const struct session *s, int *ret_fd) {
        CLEANUP(close_fds) struct reply reply = { .n_fds = 0 };
        int r = ask(s, &reply);

        if (r == -EPROTO)
                return refuse(s, NULL, "polytmpd's reply contains no namespace: %s", strerror(EPROTO));
        if (reply.foreign)
                return refuse(s, NULL, "%s does not belong to root", SOCKET_PATH);
        if (r < 0)
                return unreachable(s, strerror(-r));
        return decide(s, &reply, ret_fd);
}
