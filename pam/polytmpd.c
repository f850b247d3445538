/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Asks polytmpd for the user's namespace (AcquireNamespace), and decides what each reply means for the session.
 *
 * Not here: joining the namespace (namespace.c).
 *
 * Hard facts:
 *  - sd-bus reads DBUS_SYSTEM_BUS_ADDRESS with secure_getenv(3): su and sudo are set-user-ID (AT_SECURE), so
 *    their callers cannot redirect the request.
 *  - sd_bus_call() and sd_bus_flush() first wait for the connection to be set up, up to 90 s, whatever the
 *    call's timeout. Hence await_reply(), and a close without flush, which withdraws an unanswered request.
 *  - The bus returns NoReply if the service ends. Asked again, it has systemd start the service, or waits.
 */

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#include <security/pam_ext.h>
#include <systemd/sd-bus.h>

#include "pam_polytmp.h"

#define USEC_PER_SEC UINT64_C(1000000)

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

int acquire_namespace(const struct session *s, int *ret_fd) {
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
