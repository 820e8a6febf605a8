import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;

/** A web server that counts the requests of each connection, beside a heap that is always busy. */
public class Server {
    public static void main(String[] arguments) throws Exception {
        var counts = new ConcurrentHashMap<InetSocketAddress, Long>();
        var port = Integer.parseInt(arguments[0]);
        var server = HttpServer.create(new InetSocketAddress("0.0.0.0", port), 0);
        server.createContext("/", exchange -> {
            var body = ("count " + counts.merge(exchange.getRemoteAddress(), 1L, Long::sum)).getBytes();
            exchange.sendResponseHeaders(200, body.length);
            try (var output = exchange.getResponseBody()) {
                output.write(body);
            }
        });
        server.setExecutor(Executors.newCachedThreadPool());
        server.start();
        var timer = Executors.newScheduledThreadPool(2);
        timer.scheduleAtFixedRate(Server::churn, 0, 20, TimeUnit.MILLISECONDS);
        timer.scheduleWithFixedDelay(new Clock(), 0, 50, TimeUnit.MILLISECONDS);
    }

    private static final List<int[]> kept = new ArrayList<>();
    private static long number;

    /** Fills arrays, keeps some, and looks at what it kept: the collector moves them about. */
    private static void churn() {
        for (var turn = 0; turn < 50; turn++) {
            var array = new int[1000];
            java.util.Arrays.fill(array, (int) number++);
            if (kept.size() < 2000) {
                kept.add(array);
                continue;
            }
            var place = (int) (number % kept.size());
            var old = kept.set(place, array);
            if (old[0] != old[999]) {
                System.err.println("<3>stock: an array is not what was written");
            }
        }
    }

    /** Sees to it that the clock does not go back. */
    private static final class Clock implements Runnable {
        private long last = System.nanoTime();

        @Override
        public void run() {
            var now = System.nanoTime();
            if (now < last) {
                System.err.println("<3>stock: the clock went back from " + last + " to " + now);
            }
            last = now;
        }
    }
}
